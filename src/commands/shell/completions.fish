
function __imgtool_option
    set -l words (commandline -op)
    set -l flags -O --to
    test "$words[2]" = create; and set flags -f --format
    set -l format ""
    for i in (seq (count $words))
        set -l pair (string split -m 1 = -- $words[$i])
        if contains -- $words[$i] $flags; and test $i -lt (count $words)
            set format $words[(math $i + 1)]
        else if contains -- "$pair[1]" $flags; and test (count $pair) -eq 2
            set format $pair[2]
        end
    end
    set -l text (string replace -r '^(--options=|-o)' '' -- (commandline -ct))
    set -l before (string match -r '.*,' -- $text)
    set -l item (string replace -r '.*,' '' -- $text)
    if string match -q '*=*' -- $item
        set -l key (string split -m 1 = -- $item)[1]
        for word in (__imgtool_words "$format:$key")
            echo "$before$key=$word"
        end
    else
        for key in (__imgtool_keys "$format")
            echo "$before$key"
        end
    end
end
