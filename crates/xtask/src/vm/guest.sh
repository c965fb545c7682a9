# The guest's second stage, in the host's tree: mounts, modules, disks, then the command.
here=/run/devsplice-vm
B=$here/busybox
exec >/dev/console 2>&1 </dev/null
. $here/config.sh
. $here/env.sh
export PATH="${PATH:-/usr/bin:/bin}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"

mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr
release=$($B uname -r)
mkdir -p /lib/modules
rm -rf "/lib/modules/$release"
ln -s "$modules_directory" "/lib/modules/$release"
[ -z "$modules" ] || modprobe -a $modules || echo "devsplice-vm: modprobe failed"
for fs in "configfs /sys/kernel/config" "debugfs /sys/kernel/debug" \
    "tracefs /sys/kernel/tracing" "fusectl /sys/fs/fuse/connections" "cgroup2 /sys/fs/cgroup"; do
    mount -t ${fs% *} ${fs% *} ${fs#* } 2>/dev/null
done
$B ip link set lo up
ulimit -l unlimited
ulimit -n 65536
echo core >/proc/sys/kernel/core_pattern
if [ -n "$scratch" ]; then
    mkdir -p /scratch
    mount -o noatime "$scratch" /scratch || echo "devsplice-vm: no /scratch"
fi
mount_shares

# The host's virtiofsd keeps a descriptor for each file that this kernel remembers; where it may
# not have many, make the kernel forget in time (2: files; 4: without a line in the log).
if [ -n "$inode_limit" ]; then
    echo 4 >/proc/sys/vm/drop_caches
    while $B sleep 0.3; do
        # Not with `read`: it asks byte by byte, and such a file answers the first only.
        set -- $($B cat /proc/sys/fs/inode-nr)
        [ "$1" -lt "$inode_limit" ] || echo 2 >/proc/sys/vm/drop_caches
    done &
fi

for port in /sys/class/virtio-ports/*; do
    read -r name <$port/name
    eval "port_$name=/dev/${port##*/}"
done
exec 9>$port_control
read -r up rest </proc/uptime
echo "up $up" >&9
(
    cd "$directory" 2>/dev/null || cd /
    exec 9>&-
    exec /bin/sh $here/cmd.sh
) >$port_stdout 2>$port_stderr </dev/null
code=$?
sync
echo "rc $code" >&9
# The host ends the machine as soon as it has read that.
$B sleep 5
$B poweroff -f
