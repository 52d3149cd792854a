#!/bin/sh
# runc for a root user without CAP_SYS_RESOURCE: `docker run --privileged` and `docker exec --privileged` ask for every
# capability, and runc fails if one cannot be had. This takes that capability, and scores that need it, out of the
# configuration of the container (--bundle) or of the process (--process), then runs runc.
set -eu
bundle= process= previous=
for word in "$@"; do
    case $previous in
    --bundle | -b) bundle=$word ;;
    --process | -p) process=$word ;;
    esac
    previous=$word
done
if [ -n "$process" ]; then
    file=$process
elif [ -n "$bundle" ]; then
    file=$bundle/config.json
else
    exec /usr/sbin/runc "$@"
fi
if [ -f "$file" ]; then
    jq 'def limited:
            if .capabilities then .capabilities |= map_values(if . then map(select(. != "CAP_SYS_RESOURCE")) else . end)
            else . end
            | if (.oomScoreAdj // 0) < 0 then .oomScoreAdj = 0 else . end;
        if .process then .process |= limited else limited end' "$file" > "$file.limited"
    cat "$file.limited" > "$file"
fi
exec /usr/sbin/runc "$@"
