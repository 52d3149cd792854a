#!/bin/sh
# The first process of the private engine: it runs in new mount, network, PID, IPC and UTS namespaces, gives them a root
# file system, and becomes dockerd's init. When it ends, the kernel ends everything in the namespaces with it.
#   engine.sh ROOTFS HOME CGROUP RUNTIME [SHARED_DIRECTORY...]
set -eu
rootfs=$1 home=$2 cgroup=$3 runtime=$4
shift 4

root=$home/root
mkdir -p "$root" "$home/upper" "$home/work" "$home/docker" "$home/run"
mount -t overlay -o "lowerdir=$rootfs,upperdir=$home/upper,workdir=$home/work" overlay "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/run/engine" "$root/var/lib/docker" "$root/lib/modules"
mount --bind "$home/run" "$root/run/engine"
mount --bind "$home/docker" "$root/var/lib/docker"
if [ -d /lib/modules ]; then mount --rbind /lib/modules "$root/lib/modules"; fi
for shared in "$@"; do
    mkdir -p "$root$shared"
    mount --rbind "$shared" "$root$shared"
done
cd "$root"
mkdir -p run/host
pivot_root . run/host
umount -l /run/host

ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
set -- --host unix:///run/engine/docker.sock --host unix:///run/docker.sock --cgroup-parent "$cgroup" \
    --exec-opt native.cgroupdriver=cgroupfs
if [ "$runtime" != runc ]; then
    set -- "$@" --add-runtime "limited=$runtime" --default-runtime limited
fi
exec tini -- dockerd "$@"
