#!/bin/sh
# The first program of a node. systemd and the kubelet write settings of the kernel that a container shares with its host:
# here they write to files of the node, which cover the host's. Then the program that the arguments name runs.
set -eu
cover() {
    file=/proc/sys/$1 own=/run/host-settings/$1
    if [ -e "$file" ] && [ ! -e "$own" ]; then
        mkdir -p "$(dirname "$own")"
        echo "$2" > "$own"
        mount --bind "$own" "$file"
    fi
}
cover vm/overcommit_memory 1
cover vm/panic_on_oom 0
cover kernel/panic 10
cover kernel/panic_on_oops 1
cover kernel/keys/root_maxkeys 1000000
cover kernel/keys/root_maxbytes 25000000
cover fs/file-max "$(cat /proc/sys/fs/file-max)"
cover fs/nr_open "$(cat /proc/sys/fs/nr_open)"
exec "$@"
