#!/bin/sh
# Makes the root file system of a node, in new mount and PID namespaces: Debian's packages below, our files above, the
# steps of kind's own base image, and the images of the control plane imported into containerd.
#   node.sh ROOTFS FILES SCRATCH OUTPUT
set -eu
rootfs=$1 files=$2 scratch=$3 output=$4

root=$scratch/root
mkdir -p "$root" "$scratch/upper" "$scratch/work"
mount -t overlay -o "lowerdir=$rootfs,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$root"
cp -a "$files/." "$root/"

cd "$root"
rm -rf usr/bin/docker* usr/sbin/dockerd
# As kind's Dockerfile does: only the units that a container needs.
find lib/systemd/system/sysinit.target.wants/ -name systemd-tmpfiles-setup.service -delete
rm -f lib/systemd/system/multi-user.target.wants/* etc/systemd/system/*.wants/* \
    lib/systemd/system/local-fs.target.wants/* lib/systemd/system/sockets.target.wants/*udev* \
    lib/systemd/system/sockets.target.wants/*initctl* lib/systemd/system/basic.target.wants/*
# These change settings of the kernel that belong to the host.
rm -f usr/lib/sysctl.d/* etc/sysctl.d/99-sysctl.conf etc/sysctl.conf
echo ReadKMsg=no >> etc/systemd/journald.conf
ln -sf /usr/bin/containerd usr/local/bin/containerd
mkdir -p opt/cni etc/kubernetes/manifests kind/manifests lib/modules
ln -s /usr/lib/cni opt/cni/bin
chroot . systemctl --quiet enable kubelet.service containerd.service undo-mount-hacks.service
chroot . systemctl --quiet mask systemd-binfmt.service getty.target console-getty.service
chroot . sh -c 'ctr oci spec | jq ".hooks.createContainer += [{path: \"/kind/bin/mount-product-files.sh\"}]
    | del(.process.rlimits)" > /etc/containerd/cri-base.json'

mount -t proc proc proc
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
chroot . sh -euc '
    containerd > /tmp/containerd.log 2>&1 & containerd=$!
    until ctr version > /dev/null 2>&1; do
        kill -0 $containerd || { cat /tmp/containerd.log >&2; exit 1; }
        sleep 0.1
    done
    for archive in /kind/images/*.tar; do
        ctr --namespace k8s.io images import --all-platforms --no-unpack --digests "$archive" > /dev/null
    done
    kill $containerd
    wait $containerd || true
'
rm -r kind/images
umount proc run tmp
tar --create --numeric-owner --xattrs --one-file-system --file="$output" .
