{{- define "blip.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 30 | trimSuffix "-" }}
{{- end }}

{{/* Short, because a pool's name is added and a label holds 63 characters. */}}
{{- define "blip.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" }}
{{- else }}
{{- $name := include "blip.name" . }}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 30 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Of (dict "root" $ "component" "worker" "pool" "large"): what selects pods; never changes. */}}
{{- define "blip.selector" -}}
app.kubernetes.io/name: {{ include "blip.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
blip-batch/pool: {{ . }}
{{- end }}
{{- end }}

{{/* Of pods: without versions, so that a new chart with the same images restarts no worker. */}}
{{- define "blip.podLabels" -}}
{{ include "blip.selector" . }}
app.kubernetes.io/part-of: blip-batch
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "blip.labels" -}}
{{ include "blip.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* Of (dict "root" $ "image" .Values.image.worker): a digest wins over the tag. */}}
{{- define "blip.image" -}}
{{- if and (eq (toString .image.tag) "latest") (not .image.digest) }}
{{- fail (printf "image %s: `latest` is no version; name a tag or a digest" .image.repository) }}
{{- end }}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "blip.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* A pool with workerDefaults below it, as JSON. Of (dict "root" $ "pool" $pool). */}}
{{- define "blip.pool" -}}
{{- mustMergeOverwrite (deepCopy .root.Values.workerDefaults) (deepCopy (.pool | default dict)) | toJson }}
{{- end }}

{{/* Whole cores of a pod with these resources, at least one: its limit, else its request; empty where it has neither. */}}
{{- define "blip.cores" -}}
{{- with (.limits | default dict).cpu | default (.requests | default dict).cpu }}
{{- $cpu := toString . }}
{{- $cores := ternary (divf (trimSuffix "m" $cpu) 1000) (float64 $cpu) (hasSuffix "m" $cpu) }}
{{- if gt $cores 0.0 }}{{ ceil $cores | int }}{{ end }}
{{- end }}
{{- end }}

{{/*
Processes and threads for the cores that a pool pays for: what a process sees by itself are the node's, of which a pod
without a limit may have many for a while, and no more than it requested when others want theirs. Of the merged pool.
*/}}
{{- define "blip.coresEnv" -}}
{{- with include "blip.cores" .pool.resources }}
- name: OMP_NUM_THREADS
  value: {{ . | quote }}
{{- $given := merge (dict) $.pool.settings $.root.Values.settings }}
{{- if not (hasKey $given "BLIP_LOADERS") }}
- name: BLIP_LOADERS
  value: {{ ternary (min 32 (int .)) (min 8 (max 1 (div (int .) 2))) $.pool.gpu.enabled | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Pools that are served, as a JSON object of whole pools; `default: null` removes one. */}}
{{- define "blip.pools" -}}
{{- $pools := dict }}
{{- range $name, $pool := .Values.workerPools }}
{{- if not (kindIs "invalid" $pool) }}
{{- $_ := set $pools $name (include "blip.pool" (dict "root" $ "pool" $pool) | fromJson) }}
{{- end }}
{{- end }}
{{- $pools | toJson }}
{{- end }}

{{/* Two pools that could do the same job would each be scaled for the whole of it. */}}
{{- define "blip.refuseSharedJobs" -}}
{{- $owners := dict }}
{{- range $name, $pool := include "blip.pools" . | fromJson }}
{{- range $model := ternary (splitList "+" (join "+" $pool.models)) (list "") (gt (len $pool.models) 0) | uniq }}
{{- with get $owners $model }}
{{- $what := ternary (printf "both serve %s" $model) "both serve any model" (ne $model "") }}
{{- fail (printf "workerPools.%s and workerPools.%s %s, and each would be scaled for all of its jobs: make one pool of them (its affinity may prefer spot nodes and allow others), or give each other `models`" . $name $what) }}
{{- end }}
{{- $_ := set $owners $model $name }}
{{- end }}
{{- end }}
{{- end }}

{{- define "blip.podSecurity" -}}
runAsNonRoot: true
{{ toYaml .Values.podSecurityContext }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "blip.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "blip.serviceAccount" -}}
{{- $account := index .root.Values.serviceAccounts .component }}
{{- if $account.name }}
{{- $account.name }}
{{- else if $account.create }}
{{- printf "%s-%s" (include "blip.fullname" .root) .component }}
{{- else -}}
default
{{- end }}
{{- end }}

{{- define "blip.redisSecret" -}}
{{- .Values.redis.existingSecret | default (printf "%s-redis" (include "blip.fullname" .)) }}
{{- end }}

{{- define "blip.apiSecret" -}}
{{- .Values.api.existingSecret | default (printf "%s-api" (include "blip.fullname" .)) }}
{{- end }}

{{- define "blip.apiUrl" -}}
http://{{ include "blip.fullname" . }}-orchestrator.{{ .Release.Namespace }}.svc:{{ .Values.api.port }}
{{- end }}

{{- define "blip.secretEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret }}
      key: {{ .key }}
{{- end }}

{{/* Whole numbers as they were written: YAML made floats of them. */}}
{{- define "blip.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* Of (dict "root" $ "settings" pool-or-orchestrator settings): what both kinds of process have. */}}
{{- define "blip.env" -}}
{{- $values := .root.Values }}
{{ include "blip.secretEnv" (dict "name" "BLIP_REDIS_URL" "secret" (include "blip.redisSecret" .root) "key" $values.redis.urlKey) }}
{{- with $values.s3.existingSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
{{ include "blip.secretEnv" (dict "name" . "secret" $values.s3.existingSecret "key" .) }}
{{- end }}
{{- end }}
{{- with $values.s3.region }}
{{- /* boto3 reads the second; everything else of AWS, the first. */}}
{{- range $name := list "AWS_REGION" "AWS_DEFAULT_REGION" }}
- name: {{ $name }}
  value: {{ $values.s3.region | quote }}
{{- end }}
{{- end }}
{{- with $values.s3.endpointUrl }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
{{- end }}
{{- range $name, $value := mustMergeOverwrite (deepCopy $values.settings) (deepCopy .settings) }}
- name: {{ $name }}
  value: {{ include "blip.text" $value | quote }}
{{- end }}
{{- end }}

{{- define "blip.redisCaMount" -}}
{{- if .Values.redis.caSecret }}
- name: redis-ca
  mountPath: /etc/blip/redis
  readOnly: true
{{- end }}
{{- end }}

{{- define "blip.redisCaVolume" -}}
{{- with .Values.redis.caSecret }}
- name: redis-ca
  secret:
    secretName: {{ . }}
{{- end }}
{{- end }}

{{/* Of (dict "root" $ "of" pool-or-orchestrator "labels" selector): where pods go. */}}
{{- define "blip.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
topologySpreadConstraints:
{{- if .of.topologySpreadConstraints }}
  {{- toYaml .of.topologySpreadConstraints | nindent 2 }}
{{- else }}
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- $.labels | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}
{{- end }}

{{- define "blip.disruption" -}}
{{- if .budget.enabled }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  labels:
    {{- .labels | nindent 4 }}
spec:
  maxUnavailable: {{ .budget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow # what does not work must not hold a node back
  selector:
    matchLabels:
      {{- .selector | nindent 6 }}
{{- end }}
{{- end }}

{{/* Where checkpoints come from and are kept. */}}
{{- define "blip.hubEnv" -}}
- name: HF_HOME
  value: /models
{{- with .Values.hub.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if .Values.hub.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with .Values.hub.existingSecret }}
{{ include "blip.secretEnv" (dict "name" "HF_TOKEN" "secret" . "key" $.Values.hub.tokenKey) }}
{{- end }}
{{- end }}

{{/* Up at once; down slowly, because a worker that comes back has to load its models again. */}}
{{- define "blip.scaling" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - { type: Percent, value: 100, periodSeconds: 15 }
    - { type: Pods, value: 8, periodSeconds: 15 }
scaleDown:
  stabilizationWindowSeconds: {{ .scaleDownSeconds }}
  policies:
    - { type: Percent, value: 50, periodSeconds: 60 }
    - { type: Pods, value: 4, periodSeconds: 60 }
{{- end }}

{{/* redis.conf, but for the password. */}}
{{- define "blip.redisConfig" -}}
# Work in progress must never be evicted: Redis refuses writes when it is full, and the orchestrator pauses before that.
maxmemory {{ .Values.redis.maxMemory }}
maxmemory-policy noeviction
appendonly yes
appendfsync everysec
save ""
dir /data
protected-mode yes
{{- end }}

{{/* The ports to any address, as a JSON array: those that are listed, and those of the URLs that are to be reached. */}}
{{- define "blip.internetPorts" -}}
{{- $ports := .Values.networkPolicy.internetPorts }}
{{- range compact (list .Values.s3.endpointUrl .Values.hub.endpoint) }}
{{- $url := urlParse . }}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- $ports = append $ports $port }}
{{- end }}
{{- $numbers := list }}
{{- range $ports }}{{ $numbers = append $numbers (int .) }}{{ end }}
{{- uniq $numbers | toJson }}
{{- end }}

{{/* Egress of orchestrators and workers: names, storage and the hub, Redis. */}}
{{- define "blip.outside" -}}
{{- $values := .Values.networkPolicy }}
- to:
    {{- toYaml $values.dns | nindent 4 }}
  ports:
    - { protocol: UDP, port: 53 }
    - { protocol: TCP, port: 53 }
- to:
    {{- range $cidr := list "0.0.0.0/0" "::/0" }}
    - ipBlock:
        cidr: {{ $cidr | quote }}
        {{- $but := list }}
        {{- range $values.exceptCidrs }}
        {{- if eq (contains ":" .) (contains ":" $cidr) }}{{ $but = append $but . }}{{ end }}
        {{- end }}
        {{- with $but }}
        except:
          {{- toYaml . | nindent 10 }}
        {{- end }}
    {{- end }}
  ports:
    {{- range include "blip.internetPorts" . | fromJsonArray }}
    - { protocol: TCP, port: {{ . }} }
    {{- end }}
- ports:
    {{- range $values.redisPorts }}
    - { protocol: TCP, port: {{ . }} }
    {{- end }}
  {{- if .Values.redis.enabled }}
  to:
    - podSelector:
        matchLabels:
          {{- include "blip.selector" (dict "root" . "component" "redis") | nindent 10 }}
  {{- else if $values.redisPeers }}
  to:
    {{- toYaml $values.redisPeers | nindent 4 }}
  {{- end }}
{{- with $values.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Of the largest pool: no more workers are asked for. */}}
{{- define "blip.mostWorkers" -}}
{{- $most := 1 }}
{{- range include "blip.pools" . | fromJson }}{{ $most = max $most .autoscaling.max }}{{ end }}
{{- $most }}
{{- end }}
