
_imgtool_option() {
    local -a flags=(-O --to) options
    local format= i
    [[ $words[1] == create ]] && flags=(-f --format)
    for (( i = 2; i <= $#words; i++ )); do
        if (( $flags[(Ie)$words[i]] )); then
            format=$words[i+1]
        elif (( $flags[(Ie)${words[i]%%=*}] )); then
            format=${words[i]#*=}
        fi
    done
    _imgtool_specs "$format"
    _values -s , option $options
}
