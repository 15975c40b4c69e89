# shellcheck shell=bash
# What the launchers share: options, the command after `--`, and --dry-run. Sourced, not run.
set -euo pipefail

dry_run=0
declare -A opt
declare -a command=()

usage() { # the comment at the head of the script
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# parse "$@": options that the script has set in `opt` take a value; what follows `--` is a wpjax command.
parse() {
    while (($#)); do
        case $1 in
        --)
            shift
            command=("$@")
            break
            ;;
        --dry-run)
            dry_run=1
            shift
            ;;
        -h | --help) usage ;;
        --*)
            [[ -v opt["${1#--}"] ]] || fail "$(basename "$0") has no option $1; --help lists them"
            (($# > 1)) && [[ $2 != -- ]] || fail "$1 needs a value"
            opt[${1#--}]=$2
            shift 2
            ;;
        *) fail "$1 stands before --; the command of wpjax follows it: -- sweep --base BASE ..." ;;
        esac
    done
    [[ ${command[0]:-} == wpjax ]] && command=("${command[@]:1}")
    ((${#command[@]})) || fail "no command; say which after --: -- sweep --base BASE --expert EXPERT ..."
}

# need NAME...: options without which the script can do nothing.
need() {
    local name
    for name in "$@"; do
        [[ -n ${opt[$name]} ]] || fail "--$name is missing; --help says what it is"
    done
}

# number NAME...: options that are whole numbers from 1 on; empty ones are not asked for.
number() {
    local name
    for name in "$@"; do
        [[ -z ${opt[$name]} || ${opt[$name]} =~ ^[1-9][0-9]*$ ]] || fail "--$name ${opt[$name]} is no number from 1 on"
    done
}

# plain NAME...: options that stand in names and in YAML, where other characters would mean something.
plain() {
    local name
    for name in "$@"; do
        [[ ${opt[$name]} =~ ^[A-Za-z0-9._:/@=-]*$ ]] || fail "--$name ${opt[$name]} holds a character other than A-Z a-z 0-9 . _ : / @ = -"
    done
}

quoted() { # words as a shell reads them
    local text
    printf -v text '%q ' "$@"
    echo "${text% }"
}

# farmed: whether the sweep is dealt out in parts. Then --shards is needed, and the parts write no result of their own.
farmed() {
    [[ -n ${opt[parts]} ]] || return 1
    need shards out
    [[ ${command[0]} == sweep ]] || fail "--parts deals out a sweep, not ${command[0]}"
    [[ " ${command[*]} " != *" --out "* ]] || fail "--out belongs before --: the parts write shards, and collect writes the result"
}

part_of() { # the command of one part; $1 is its number, or a word of the shell that gives it
    echo "wpjax $(quoted "${command[@]}") --part $1/${opt[parts]} --shards $(quoted "${opt[shards]}")"
}

collecting() { quoted wpjax collect "${opt[shards]}" --out "${opt[out]}"; }

whole() { # the command as one program, which goes on where an earlier run of it ended
    [[ " ${command[*]} " == *" --resume "* ]] || case ${command[0]} in
    sweep | validate | relax | extract | finetune) command+=(--resume) ;;
    esac
    quoted wpjax "${command[@]}"
}

out_of() { # the file that the command writes; nothing if it names none
    local i
    for ((i = 0; i < ${#command[@]}; i++)); do
        case ${command[i]} in
        --out) echo "${command[i + 1]:-}" ;;
        --out=*) echo "${command[i]#--out=}" ;;
        esac
    done
}

indented() { # lines as a block of YAML, after $1 blanks
    local line blanks
    printf -v blanks '%*s' "$1" ''
    while IFS= read -r line; do echo "$blanks$line"; done
}

run() { # a command, or what it would be
    if ((dry_run)); then
        quoted "$@"
    else
        "$@"
    fi
}

run_with() { # a command that reads the text $1, or what it would be
    local text=$1
    shift
    if ((dry_run)); then
        printf "%s <<'END'\n%s\nEND\n" "$(quoted "$@")" "$text"
    else
        "$@" <<<"$text"
    fi
}
