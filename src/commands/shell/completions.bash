
# The format of the new image, as set on the command line.
_imgtool_format() {
    local i flags=" -O --to "
    [[ ${COMP_WORDS[1]} == create ]] && flags=" -f --format "
    for ((i = 2; i + 1 < ${#COMP_WORDS[@]}; i++)); do
        if [[ $flags == *" ${COMP_WORDS[i]} "* ]]; then
            [[ ${COMP_WORDS[i + 1]} == "=" ]] && ((i++))
            echo "${COMP_WORDS[i + 1]}"
            return
        fi
    done
}

# The value of -o up to the cursor; bash splits words at each '='.
_imgtool_o_value() {
    local i=$COMP_CWORD text=""
    while ((i > 1)); do
        text="${COMP_WORDS[i]}$text"
        case "${COMP_WORDS[i - 1]}" in
            -o | --options) echo "${text#=}"; return 0 ;;
            =) ;;
            *) [[ ${COMP_WORDS[i]} == "=" ]] || return 1 ;;
        esac
        ((i--))
    done
    return 1
}

_imgtool_or_option() {
    local text item cur="${COMP_WORDS[COMP_CWORD]}"
    if ! text=$(_imgtool_o_value); then
        _imgtool "$@"
        # A path, name or number follows 'file=', 'env=' and 'fd='.
        [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
        return 0
    fi
    [[ $cur == "=" ]] && cur=""
    item="${text##*,}"
    if [[ $item == *=* ]]; then
        local value="${item#*=}"
        COMPREPLY=($(compgen -P "${cur%"$value"}" -W "$(_imgtool_words "$(_imgtool_format):${item%%=*}")" -- "$value"))
    else
        COMPREPLY=($(compgen -P "${cur%"$item"}" -W "$(_imgtool_keys "$(_imgtool_format)")" -- "$item"))
    fi
    # No blank after 'cluster_size=': a value follows.
    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _imgtool_or_option -o bashdefault -o default imgtool
