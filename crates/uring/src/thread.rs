//! Answers for what threads must be in a process that serves a device: an I/O thread never waits
//! for it, and a thread that does wait for it stands apart.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc;
use std::thread::JoinHandle;

use devsplice_core::{Error, Result};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountPropagationFlags, mount_change};

/// include/uapi/linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Marks the calling thread as one that memory reclaim must not wait on (`PR_SET_IO_FLUSHER`,
/// Linux 5.6): we sit below writeback. Threads and io_uring workers created later inherit it.
///
/// # Errors
/// Without CAP_SYS_RESOURCE. The thread works, but may dead-lock when memory runs out.
pub fn set_io_flusher() -> Result<()> {
    let (on, zero): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: this prctl takes plain numbers and touches no memory of ours.
    let done = unsafe { libc::prctl(PR_SET_IO_FLUSHER, on, zero, zero, zero) };
    if done == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Error::os("PR_SET_IO_FLUSHER", &error).next("run with CAP_SYS_RESOURCE"))
}

/// Gives the calling process mounts of its own, which follow those that it had: what is mounted and
/// unmounted there is here, too, and not the other way round. For a process with one thread.
///
/// # Errors
/// Without CAP_SYS_ADMIN.
pub fn own_mounts() -> Result<()> {
    let failed = |error: io::Error| Error::os("mounts of its own", &error);
    // SAFETY: CLONE_NEWNS alone; it touches no memory and no descriptor of this process.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let follow = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", follow).map_err(|errno| failed(errno.into()))
}

/// The numbers of system calls.
pub mod calls {
    pub use libc::*;
}

/// Has the kernel ask `program` (classic BPF: code, jump if true, jump if false, constant) about
/// each system call of the calling thread and of threads that it starts, and log what that refuses.
/// For good.
///
/// # Errors
/// If the kernel has no seccomp, or the program is none.
pub fn restrict_calls(program: &[(u16, u8, u8, u32)]) -> Result<()> {
    let failed = |error: io::Error| Error::os("seccomp", &error);
    rustix::thread::set_no_new_privs(true).map_err(|errno| failed(errno.into()))?;
    let line = |&(code, jt, jf, k): &(u16, u8, u8, u32)| libc::sock_filter { code, jt, jf, k };
    let mut lines: Vec<_> = program.iter().map(line).collect();
    let len = u16::try_from(lines.len()).map_err(|_| Error::invalid("seccomp", "too long"))?;
    let program = libc::sock_fprog { len, filter: lines.as_mut_ptr() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_LOG);
    // SAFETY: the kernel copies `len` lines from `filter`; `lines` keeps them until after the call.
    if unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(())
}

/// The start of a thread, to be done by another one.
pub type Start = Box<dyn FnOnce() + Send>;

thread_local! {
    static STARTER: RefCell<Option<mpsc::Sender<Start>>> = const { RefCell::new(None) };
}

/// Has what the calling thread would start be started by whoever receives from `by`. A thread
/// inherits what its maker is forbidden, and helpers may do what an I/O thread may not.
pub fn start_by(by: mpsc::Sender<Start>) {
    STARTER.set(Some(by));
}

/// Starts a helper thread, or has it started by whoever [`start_by`] has named.
///
/// # Errors
/// If there is none to be had.
pub fn start(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let start = move || std::thread::Builder::new().name(name).spawn(body);
    let Some(by) = STARTER.with_borrow(Clone::clone) else { return start() };
    let (answer, started) = mpsc::channel();
    // Where nobody does it, nothing comes, either.
    let _ = by.send(Box::new(move || drop(answer.send(start()))));
    started.recv().map_err(io::Error::other)?
}

/// Runs `work` on a thread with a table of descriptors of its own, which holds nothing but standard
/// input, output and error, and the directory `dir` (`O_PATH`). What it waits for can then come
/// from this process: when the process is killed, its files (and so the device that it serves)
/// close although this thread still waits for them. `work` must bring no descriptors along: they
/// are not in its table.
///
/// # Errors
/// If there is no thread, or no table, to be had.
pub fn apart<T: Send + 'static>(
    dir: Option<BorrowedFd<'_>>,
    work: impl FnOnce(Option<OwnedFd>) -> T + Send + 'static,
) -> io::Result<mpsc::Receiver<T>> {
    let kept = dir.map(|dir| dir.as_raw_fd());
    let (ready, is_ready) = mpsc::channel();
    let (answer, result) = mpsc::channel();
    std::thread::Builder::new().name("apart".to_owned()).stack_size(256 << 10).spawn(
        move || {
            let dir = match own_table(kept) {
                Ok(dir) => dir,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(()));
            let _ = answer.send(work(dir));
        },
    )?;
    // `dir` stays open until the other table has it.
    is_ready.recv().map_err(io::Error::other)??;
    Ok(result)
}

/// Gives the calling thread a table of descriptors with only the first three, and `kept`.
fn own_table(kept: Option<RawFd>) -> io::Result<Option<OwnedFd>> {
    let Some(kept) = kept else { return cut_table(3, u32::MAX).map(|()| None) };
    let path = own_path(kept);
    let has_proc = std::fs::symlink_metadata(path).is_ok();
    if has_proc { reopened(kept) } else { copied(kept) }.map(Some)
}

fn own_path(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

/// Nothing is copied that would only be closed: a server of many disks has ten thousand
/// descriptors. (The kernel leaves out the end of the table, fs/file.c, `sane_fdtable_size`; with
/// `kept` in the new one, which has a high number, it would copy what is before that.)
fn reopened(kept: RawFd) -> io::Result<OwnedFd> {
    cut_table(3, u32::MAX)?;
    // By way of the process, whose table is the one that this thread began with.
    Ok(open(own_path(kept), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// The same where there is no /proc: what is before `kept` is copied, and closed.
fn copied(kept: RawFd) -> io::Result<OwnedFd> {
    let number = u32::try_from(kept).map_err(io::Error::other)?;
    cut_table(number.saturating_add(1), u32::MAX)?;
    if number > 3 {
        cut_table(3, number - 1)?;
    }
    // SAFETY: the number is open here, for this table is a copy of one in which it was; and nothing
    // in this table owns it: the caller's owner of it is in the other.
    Ok(unsafe { OwnedFd::from_raw_fd(kept) })
}

/// Closes a range of numbers in a table that is the calling thread's own afterwards.
fn cut_table(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: this gives the calling thread a table of its own before anything is closed, and the
    // thread has just begun: it uses nothing of what is closed there.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_thread_apart_has_what_it_is_given_and_nothing_else() {
        let files: Vec<_> = (0..20).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let dir = open("/usr", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let is_dir = std::fs::metadata("/usr").unwrap().ino();
        for take in [reopened, copied] {
            let raw = dir.as_fd().as_raw_fd();
            let (inode, numbers) = std::thread::spawn(move || {
                let dir = take(raw).unwrap();
                let inode = rustix::fs::fstat(&dir).unwrap().st_ino;
                let list = std::fs::read_dir("/proc/thread-self/fd").unwrap();
                let numbers = list.map(|one| one.unwrap().file_name().into_string().unwrap());
                let numbers = numbers.filter_map(|one| one.parse::<i32>().ok());
                // That by which they are listed is the lowest that was free.
                (inode, numbers.filter(|one| *one > 2).count())
            })
            .join()
            .unwrap();
            assert_eq!((inode, numbers), (is_dir, 2));
        }
        // Here all is as it was.
        assert!(files.iter().all(|file| rustix::fs::fstat(file).is_ok()));
        assert_eq!(rustix::fs::fstat(&dir).unwrap().st_ino, is_dir);
    }
}
