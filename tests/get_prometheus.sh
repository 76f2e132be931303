#!/bin/sh
# Puts prometheus and promtool into the folder $1: those on PATH, else Debian's package, unpacked there without root.
set -eu
mkdir -p "$1"
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    ln -sf "$(command -v prometheus)" "$(command -v promtool)" "$1"
    exit
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if command -v dpkg-deb >/dev/null; then
    (cd "$work" && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; }) >"$work/log" 2>&1 || true
    for package in "$work"/prometheus_*.deb; do
        [ -e "$package" ] || break
        dpkg-deb --extract "$package" "$work/files"
        cp "$work/files/usr/bin/prometheus" "$work/files/usr/bin/promtool" "$1"
        exit
    done
fi
echo "tests of metrics need prometheus and promtool: install the package prometheus (apt, brew), or put both into $1" >&2
exit 1
