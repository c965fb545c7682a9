//! Answers for the lists of system calls: what an I/O thread may do, what no server ever does.

use devsplice_uring::thread::calls as sys;

/// Checked by their arguments.
pub const TGKILL: i64 = sys::SYS_tgkill;
pub const CLONE: i64 = sys::SYS_clone;
pub const CLONE3: i64 = sys::SYS_clone3;
pub const SOCKET: i64 = sys::SYS_socket;

/// include/uapi/linux/sched.h.
pub const CLONE_THREAD: u64 = 0x0001_0000;

/// Sockets that a server may have: control clients and systemd (1, AF_UNIX), disks elsewhere (2,
/// 10, 40: AF_INET, AF_INET6, AF_VSOCK), and what looks their names up (16, AF_NETLINK).
pub const FAMILIES: &[u64] = &[1, 2, 10, 16, 40];

/// All that an I/O thread does once it is settled: its ring, its memory, what is open already, its
/// end. It opens nothing, connects to nothing, and starts nothing.
pub const IO_THREAD: &[i64] = &[
    sys::SYS_io_uring_enter,
    sys::SYS_io_uring_register,
    // Eventfds, the log, and what byte backends and codecs do with what is open.
    sys::SYS_read,
    sys::SYS_write,
    sys::SYS_readv,
    sys::SYS_writev,
    sys::SYS_pread64,
    sys::SYS_pwrite64,
    sys::SYS_preadv,
    sys::SYS_pwritev,
    sys::SYS_lseek,
    sys::SYS_fsync,
    sys::SYS_fdatasync,
    sys::SYS_fstat,
    sys::SYS_close,
    // Sockets of clients that it serves; they are made elsewhere.
    sys::SYS_shutdown,
    sys::SYS_sendto,
    sys::SYS_sendfile,
    sys::SYS_getsockopt,
    sys::SYS_dup,
    sys::SYS_fcntl,
    sys::SYS_poll,
    sys::SYS_ppoll,
    sys::SYS_eventfd2,
    // A client is shown the door.
    sys::SYS_shutdown,
    // Memory.
    sys::SYS_mmap,
    sys::SYS_munmap,
    sys::SYS_mremap,
    sys::SYS_mprotect,
    sys::SYS_madvise,
    sys::SYS_mlock,
    sys::SYS_munlock,
    sys::SYS_brk,
    sys::SYS_getrandom,
    // Other threads, and time.
    sys::SYS_futex,
    sys::SYS_sched_yield,
    sys::SYS_sched_getaffinity,
    sys::SYS_gettid,
    sys::SYS_getpid,
    sys::SYS_clock_gettime,
    sys::SYS_clock_nanosleep,
    sys::SYS_nanosleep,
    // Its end, and the process's.
    sys::SYS_exit,
    sys::SYS_exit_group,
    sys::SYS_rt_sigaction,
    sys::SYS_rt_sigprocmask,
    sys::SYS_rt_sigreturn,
    sys::SYS_sigaltstack,
    sys::SYS_restart_syscall,
    sys::SYS_rseq,
    sys::SYS_set_robust_list,
];

/// What one of a pool does as well: it waits for the rings of many devices, and makes those of
/// devices that come. All that it needs for them is open when they come.
pub const POOL_THREAD: &[i64] = &[
    sys::SYS_io_uring_setup,
    sys::SYS_pipe2,
    sys::SYS_epoll_create1,
    sys::SYS_epoll_ctl,
    sys::SYS_epoll_wait,
    sys::SYS_epoll_pwait,
    sys::SYS_epoll_pwait2,
];

/// What no thread of a server has a reason for, once there is one: other programs and processes,
/// the machine as a whole, other users, mounts at paths.
pub const NEVER: &[i64] = &[
    sys::SYS_execve,
    sys::SYS_execveat,
    sys::SYS_fork,
    sys::SYS_vfork,
    sys::SYS_unshare,
    sys::SYS_kill,
    sys::SYS_tkill,
    sys::SYS_rt_sigqueueinfo,
    sys::SYS_pidfd_send_signal,
    sys::SYS_pidfd_getfd,
    sys::SYS_ptrace,
    sys::SYS_process_vm_readv,
    sys::SYS_process_vm_writev,
    sys::SYS_process_madvise,
    sys::SYS_kcmp,
    sys::SYS_init_module,
    sys::SYS_finit_module,
    sys::SYS_delete_module,
    sys::SYS_kexec_load,
    sys::SYS_kexec_file_load,
    sys::SYS_reboot,
    sys::SYS_bpf,
    sys::SYS_perf_event_open,
    sys::SYS_userfaultfd,
    sys::SYS_syslog,
    sys::SYS_swapon,
    sys::SYS_swapoff,
    sys::SYS_acct,
    sys::SYS_quotactl,
    sys::SYS_sethostname,
    sys::SYS_setdomainname,
    sys::SYS_settimeofday,
    sys::SYS_clock_settime,
    sys::SYS_clock_adjtime,
    sys::SYS_adjtimex,
    sys::SYS_iopl,
    sys::SYS_ioperm,
    sys::SYS_add_key,
    sys::SYS_request_key,
    sys::SYS_keyctl,
    sys::SYS_setuid,
    sys::SYS_setgid,
    sys::SYS_setreuid,
    sys::SYS_setregid,
    sys::SYS_setresuid,
    sys::SYS_setresgid,
    sys::SYS_setgroups,
    sys::SYS_capset,
    sys::SYS_personality,
    sys::SYS_open_by_handle_at,
    sys::SYS_mount,
    sys::SYS_umount2,
    sys::SYS_move_mount,
    sys::SYS_open_tree,
    sys::SYS_fspick,
    sys::SYS_mount_setattr,
    sys::SYS_pivot_root,
    sys::SYS_chroot,
    sys::SYS_setns,
];
