"""Arguments of the forward passes beyond test_parity_matrix.py: caches, embeddings, what configurations say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from small_models import small_config
from torch import Tensor
from twins import assert_close, images, twins, words

from blip_engine import BlipConfig, BlipModel, BlipTextModel, BlipVisionModel

MORE = {"output_attentions": True, "output_hidden_states": True}


class TestCaches:
    @torch.no_grad()
    @pytest.mark.parametrize("given", [{}, {"encoder_hidden_states": torch.randn(3, 9, 48)}])
    def test_step_by_step(self, given: dict[str, Any]) -> None:
        ours, theirs = twins("caption")
        ids, mask = words(3, 6), torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] + [1] * 5])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        pasts: list[Any] = [None, None]
        for start, end in ((0, 3), (3, 4), (4, 6)):
            outputs = [
                model.text_decoder(
                    ids[:, start:end],
                    mask[:, :end],
                    places[:, start:end],
                    past_key_values=past,
                    use_cache=True,
                    **given,
                )
                for model, past in zip((ours, theirs), pasts, strict=True)
            ]
            pasts = [output.past_key_values for output in outputs]
            seen = mask[:, start:end].bool()  # what padding says means nothing
            assert_close(outputs[0].logits[seen], outputs[1].logits[seen])

    def test_gradients_flow_through_a_cache(self) -> None:
        ours, _ = twins("caption")
        ids, states = words(3, 6), torch.randn(3, 9, 48)

        def gradients(logits: Tensor) -> list[Tensor]:
            ours.zero_grad()
            logits.square().mean().backward()
            return [p.grad.clone() for p in ours.text_decoder.bert.parameters() if p.grad is not None]

        whole = gradients(ours.text_decoder(ids, encoder_hidden_states=states).logits)
        past, parts = None, []
        for part in ids.split(2, dim=1):
            output = ours.text_decoder(part, encoder_hidden_states=states, past_key_values=past)
            past = output.past_key_values
            parts.append(output.logits)
        for mine, truth in zip(gradients(torch.cat(parts, dim=1)), whole, strict=True):
            assert_close(mine, truth)

    def test_labels_and_encoders_make_none(self) -> None:
        ours, _ = twins("caption")
        ids = words(3, 5)
        assert ours.text_decoder(ids, labels=ids, use_cache=True).past_key_values is None
        assert ours.text_decoder(ids, is_decoder=False, use_cache=True).past_key_values is None
        ours.text_decoder.config.use_cache = False
        assert ours.text_decoder(ids).past_key_values is None


class TestEmbeddings:
    @torch.no_grad()
    def test_inputs_encoder_embeds_and_positions(self) -> None:
        ours, theirs = (model.text_decoder.bert for model in twins("caption"))
        ids, mask = words(3, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
        embedded = ours.get_input_embeddings()(ids)
        places = torch.tensor([[5, 4, 3, 2, 1, 0]])
        for given in (
            {"inputs_embeds": embedded},
            {"inputs_embeds": embedded, "position_ids": places},
            {"encoder_embeds": torch.randn(3, 6, 32)},
            {"encoder_embeds": torch.randn(3, 6, 32), "is_decoder": True},
            {"input_ids": ids, "position_ids": places, "is_decoder": True},
            {"input_ids": ids, "position_ids": places.expand(3, -1)},
        ):
            call = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
            truth = theirs(attention_mask=mask, **call).last_hidden_state
            assert_close(ours(attention_mask=mask, **given).last_hidden_state, truth)

    @torch.no_grad()
    def test_the_callers_embeddings_are_left_alone(self) -> None:
        ours, theirs = (model.text_decoder.bert for model in twins("caption"))
        embedded = ours.get_input_embeddings()(words(3, 6))
        kept = embedded.clone()
        ours(inputs_embeds=embedded)
        assert embedded.equal(kept)
        theirs(inputs_embeds=embedded)  # adds the positions to the caller's tensor
        assert not embedded.equal(kept)

    @torch.no_grad()
    def test_one_of_them_and_only_one(self) -> None:
        ours, _ = twins("caption")
        ids = words(3, 6)
        with pytest.raises(ValueError, match="both input_ids and inputs_embeds"):
            ours.text_decoder(ids, inputs_embeds=torch.randn(3, 6, 32))
        with pytest.raises(ValueError, match="have to specify input_ids"):
            ours.text_decoder()


class TestConfigurations:
    """A configuration decides what a call does not say."""

    @torch.no_grad()
    def test_towers(self) -> None:
        config = BlipConfig(**small_config())
        for settings, tuples in ((MORE, False), (MORE | {"return_dict": False}, True)):
            vision = BlipVisionModel(replace(config.vision_config, **settings))
            text = BlipTextModel(replace(config.text_config, **settings))
            for output in (vision(images(twins("itm")[0])), text(words(2, 4))):
                assert isinstance(output, tuple) is tuples
                assert len(output) >= 4
            assert len(vision(images(twins("itm")[0]), output_attentions=False, return_dict=True)) == 3

    @pytest.mark.parametrize("part", [None, "vision_config", "text_config"])
    @torch.no_grad()
    def test_whole_models(self, part: str | None) -> None:
        settings = small_config()
        (settings[part] if part else settings).update(MORE | {"return_dict": False})
        model = BlipModel(BlipConfig(**settings)).eval()
        output = model(words(3, 4), images(model))
        assert isinstance(output, tuple) is (part is None)  # the parts of a model return to it
        text, vision = output[-2:]
        assert len(vision) == (4 if part != "text_config" else 2)
        assert len(text) == (5 if part != "vision_config" else 2)
        again = model(words(3, 4), images(model), output_attentions=False, output_hidden_states=False, return_dict=True)
        assert len(again.text_model_output) == len(again.vision_model_output) == 2

    @torch.no_grad()
    def test_files_keep_them(self, tmp_path: Any) -> None:
        BlipConfig(**small_config(), **MORE).save_pretrained(tmp_path)
        theirs = transformers.BlipConfig.from_pretrained(tmp_path)
        assert theirs.output_attentions
        assert theirs.output_hidden_states
        assert BlipConfig.from_json_file(tmp_path / "config.json").output_attentions
