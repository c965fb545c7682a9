#!/bin/busybox sh
# First process of the guest: puts the host's / below a tmpfs and goes on in there.
B=/bin/busybox
die() { echo "devsplice-vm: $1"; $B poweroff -f; }

$B mkdir -p /proc /sys /dev /lower /upper /root
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev
for m in /modules/*.ko; do
    [ -e "$m" ] && { $B insmod "$m" || echo "devsplice-vm: insmod $m failed"; }
done
$B mount -t virtiofs -o ro hostroot /lower || die "no virtiofs of the host's /"
$B mount -t tmpfs -o size=75%,mode=755 tmpfs /upper || die "no tmpfs"
$B mkdir /upper/data /upper/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /root ||
    die "no overlay"
$B mkdir -p /root/proc /root/sys /root/dev /root/run
for d in proc sys dev; do $B mount --move /$d /root/$d; done
$B mount -t tmpfs -o mode=755 tmpfs /root/run
$B mkdir -p /root/run/lock /root/run/udev /root/run/devsplice-vm
$B cp /bin/busybox /guest.sh /config.sh /env.sh /cmd.sh /root/run/devsplice-vm/
exec $B switch_root /root /run/devsplice-vm/busybox sh /run/devsplice-vm/guest.sh
