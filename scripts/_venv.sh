# shellcheck shell=sh
# Sourced by the other scripts and .ci/run with the repository's folder in $root.

say() {
    printf 'flaxgpt: %s\n' "$*" >&2
}

# Prints the path of the Python to make .venv from. Each candidate is run: pyenv puts commands on
# PATH even for inactive versions, and Debian's python3 may lack ensurepip, without which venv fails
# (uv needs neither).
find_python() {
    modules='ensurepip, venv'
    if [ "$installer" = uv ]; then modules=sys; fi
    if [ -n "${FLAXGPT_PYTHON:-}" ]; then
        set -- "$FLAXGPT_PYTHON"
    else
        set -- python3.13 python3.12 python3.11 python3 "$(uv python find '>=3.11' 2>/dev/null)"
    fi
    for candidate in "$@"; do
        # The real path, because python3 may belong to the .venv that is about to be replaced.
        if "$candidate" -c "
import os, sys, $modules
if sys.version_info < (3, 11): sys.exit(1)
print(os.path.realpath(sys.executable))" 2>/dev/null </dev/null; then
            return
        fi
    done
    if [ -n "${FLAXGPT_PYTHON:-}" ]; then
        say "FLAXGPT_PYTHON is '$FLAXGPT_PYTHON', which does not run as Python 3.11 or later with" \
            "venv and pip; set it to one that does, or unset it"
    else
        say "found no Python 3.11 or later with venv and pip among python3.13, python3.12," \
            "python3.11 and python3; install one (on Debian and Ubuntu python3-venv too) or set" \
            "FLAXGPT_PYTHON to its path"
    fi
    return 1
}

# prepare LIST... installs the packages pinned in those lists in scripts/ into .venv, or into the
# folder of the repository that $folder names. A stamp file records what it contains: its Python, then
# the checksum of each list. It is written last, so an interrupted run leaves none and the next run
# starts over.
prepare() (
    cd "$root/scripts"
    folder=${folder:-.venv}
    # Two simultaneous first runs take turns. macOS has no flock, so there they must not overlap.
    if command -v flock >/dev/null && ! flock -n 9; then
        say "waiting for another run, which is setting up an environment"
        flock 9
    fi

    if uv --version >/dev/null 2>&1; then installer=uv; else installer=pip; fi
    venv=$root/$folder
    stamp=$venv/flaxgpt-stamp
    held=$(cat "$stamp" 2>/dev/null || true)
    python=$(printf '%s\n' "$held" | head -n 1)
    if [ -n "${FLAXGPT_PYTHON:-}" ] || [ ! -x "$python" ]; then
        python=$(find_python) || exit 1 # also where the caller looks at the result
    fi
    wanted=$(printf '%s\n' "$python" && cksum "$@")
    # A .venv with further lists serves too, so scripts/flaxgpt keeps what scripts/docs installed.
    case $held in "$wanted"*) exit ;; esac

    say "setting up $folder from $* with $installer and $python" \
        "(about ${download:-180} MB to download, about a minute)"
    rm -f "$stamp"
    # Lists can only be added; anything else rebuilds it.
    case $wanted in "${held:-nothing}"*) ;; *) rm -rf "$venv" ;; esac
    for list in "$@"; do
        shift
        set -- "$@" -r "$list"
    done
    if [ "$installer" = uv ]; then
        { [ -d "$venv" ] || uv venv --quiet --seed --python "$python" "$venv"; } &&
            uv pip install --quiet --python "$venv/bin/python" "$@"
    else
        { [ -d "$venv" ] || "$python" -m venv "$venv"; } &&
            # Python compiles what it imports, a small part of what is installed.
            "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile "$@"
    fi >&2 || {
        say "the installation failed with the error above; run the command again to retry"
        exit 1
    }
    printf '%s\n' "$wanted" >"$stamp"
) 9<"$root/scripts/_venv.sh"
