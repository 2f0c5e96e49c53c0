#!/usr/bin/env bash
# The documentation, built in a fresh environment. With TORCH_FROM=SITE-PACKAGES torch is taken from there.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export PIP_CONSTRAINT="$PWD/.ci/constraints.txt" PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$place/venv"
if [ -n "${TORCH_FROM:-}" ]; then
    echo "$TORCH_FROM" >"$(echo "$place"/venv/lib/python3*/site-packages)/torch.pth"
fi
"$place/venv/bin/pip" install -e ".[docs]"
"$place/venv/bin/mkdocs" build --strict -f docs/site/mkdocs.yml
# A member that a page of the reference lists is left out without a word where it is not found.
grep -rhoP '^::: \K\S+|members: \[\K[^]]+' docs/reference | while IFS= read -r line; do
    case $line in
        triton_optim*) object=$line ;;
        *) for member in ${line//,/ }; do
            grep -rqF "id=\"$object.$member\"" build/docs/reference || { echo "no page has $object.$member" >&2; exit 1; }
        done ;;
    esac
done
# Nothing that a reader's browser would fetch from elsewhere.
if grep -rnoE '<(script|link|img|iframe)[^>]+(src|href)="https?://[^"]+' build/docs --include='*.html' | grep -v canonical; then
    echo "the pages ask other machines for these" >&2
    exit 1
fi
