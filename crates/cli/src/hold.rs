//! Answers for changing a disk while it is used: requests wait in the kernel meanwhile. Also for
//! the commands that ask its server for that.

use std::time::Duration;

use devsplice_backends::Access;
use devsplice_core::size::show_size;
use devsplice_core::{Error, ErrorKind, Result};
use devsplice_exports::ublk::Fit;
use devsplice_spec::Plan;
use serde_json::{Value, json};

use crate::adopt;
use crate::args::{Resize, Swap};
use crate::assemble::{CATALOG, assemble};
use crate::front::{Front, Suspended};
use crate::guard::Hearing;
use crate::hosted::{self, Hosted, Phase};
use crate::{client, say, state};

/// How long a server may take to finish what is in flight, and to start again.
const LIMIT: Duration = Duration::from_secs(150);

/// Sends a command without arguments and prints the answer.
///
/// # Errors
/// If there is no such disk, or its server cannot do it.
pub fn plain(name: &str, method: &str) -> Result<()> {
    ask(name, method, &json!({}))
}

/// Has a disk go on with another stack.
///
/// # Errors
/// If the stack makes no sense, or the server cannot do it.
pub fn swap(swap: &Swap) -> Result<()> {
    let here = std::env::current_dir().map_err(|error| Error::os("current directory", &error))?;
    let plan = Plan::load(&swap.stack, &CATALOG)?.anchored(&here)?;
    let params = json!({
        "stack": plan.to_expression(), "labels": plan.labels(), "shrink": swap.shrink,
    });
    ask(&swap.name, "swap", &params)
}

/// Has a disk's users told of its size.
///
/// # Errors
/// If the server cannot do it.
pub fn resize(resize: &Resize) -> Result<()> {
    ask(&resize.name, "resize", &json!({ "shrink": resize.shrink }))
}

fn ask(word: &str, method: &str, params: &Value) -> Result<()> {
    let found = state::find(word)?;
    let name = &found.disk.name;
    if !found.alive {
        let error = Error::new(ErrorKind::NotFound, name, "its server is gone");
        return Err(error.next(format!("devsplice recover {name} serves it again")));
    }
    let answer = client::call(name, method, params, LIMIT)?;
    say!("{}", answer.as_str().unwrap_or_default());
    Ok(())
}

impl Hosted {
    /// Whether nothing of it would go with its server.
    ///
    /// # Errors
    /// What would.
    pub(crate) fn can_be_left(&self) -> Result<()> {
        if matches!(self.phase, Phase::Up(Front::Nbd(_)) | Phase::Held(Suspended::Nbd(_))) {
            let reason = "is reached by NBD, so it goes with its server";
            return Err(Error::new(ErrorKind::Unsupported, self.thing(), reason));
        }
        self.can_be_held()
    }

    /// Whether it can do without what is below for a while.
    fn can_be_held(&self) -> Result<()> {
        if let Some(place) = hosted::passing(&self.plan) {
            let reason = "what is in it would go with that";
            return Err(Error::new(ErrorKind::Unsupported, place, reason));
        }
        match &self.phase {
            Phase::Up(front) => front.can_be_suspended(),
            _ => Err(Error::invalid(self.thing(), "is quiesced already")),
        }
    }

    /// Whether it would outlive a failure on the way to being held. Where the kernel does not keep
    /// it that is up to its guard; this process, shut in as it is, can start no other.
    fn can_be_spared(&self) -> Result<()> {
        let is_up_to_guard = match &self.phase {
            Phase::Up(front) => !front.kept().0.is_empty(),
            _ => false,
        };
        if !is_up_to_guard {
            return Ok(());
        }
        let name = &self.disk.name;
        let (reason, next) = match self.line.keeper() {
            (Hearing::Good, _) => return Ok(()),
            (Hearing::Gone, _) => {
                let next = "makes a server with a guard; then try again";
                ("has died".to_owned(), format!("devsplice upgrade {name} {next}"))
            }
            (Hearing::Silent, pid) => {
                let reason = format!("(process {pid}) does not answer, as one that is stopped");
                (reason, format!("kill -CONT {pid}, then try again"))
            }
        };
        let reason = format!(
            "its guard {reason}, and without one the disk would go with its server if anything \
             failed on the way"
        );
        Err(Error::new(ErrorKind::Unsupported, self.thing(), reason).next(next))
    }

    /// Finishes what is in flight, lets go of the stack. The kernel holds what comes.
    pub(crate) fn hold(&mut self) -> Result<()> {
        self.hold_with(&mut || ())
    }

    /// As [`Hosted::hold`]; `late` is called each time that it takes another minute.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn hold_with(&mut self, late: &mut dyn FnMut()) -> Result<()> {
        self.can_be_held()?;
        let front = match std::mem::replace(&mut self.phase, Phase::Between) {
            Phase::Up(front) => front,
            other => {
                self.phase = other;
                return Err(Error::invalid(self.thing(), "is quiesced already"));
            }
        };
        self.line.pause();
        let name = self.disk.name.clone();
        let mut late = |text: &str| {
            hosted::report(&name, text);
            late();
        };
        match front.suspend(&mut late) {
            Ok(suspended) => {
                self.phase = Phase::Held(suspended);
                self.disk.ending = false;
                Ok(())
            }
            Err((front, error)) => {
                if front.is_ending() {
                    // Whoever does not ask this process (`list`) is to know it as well.
                    self.disk.ending = true;
                    let _ = self.claim.write(&self.disk);
                } else {
                    self.line.serve(front.crew());
                }
                self.phase = Phase::Up(front);
                Err(error)
            }
        }
    }

    /// Serves `plan` from now on.
    fn go_on(&mut self, plan: &Plan, fit: Fit) -> Result<()> {
        let suspended = match std::mem::replace(&mut self.phase, Phase::Between) {
            Phase::Held(suspended) => suspended,
            other => {
                self.phase = other;
                return Err(Error::invalid(self.thing(), "is not quiesced"));
            }
        };
        let mut disk = self.disk.clone();
        let service = match hosted::open(plan, &mut disk, self.line.pool()) {
            Ok(service) => service,
            Err(error) => {
                self.phase = Phase::Held(suspended);
                return Err(error);
            }
        };
        disk.quiesced = false;
        // Before the first request is served: who comes after this process has to serve what that
        // one was written to.
        if let Err(error) = self.claim.write(&disk) {
            self.phase = Phase::Held(suspended);
            return Err(error);
        }
        match suspended.resume(service, fit) {
            Ok(mut front) => {
                self.line.entrust(&mut front, &mut disk);
                disk.warnings.extend(front.crew().warnings.iter().cloned());
                disk.low_depth = front.is_low_depth();
                self.line.serve(front.crew());
                self.phase = Phase::Up(front);
                self.disk = disk;
                self.plan = plan.clone();
                // What matters is written already.
                self.note();
                Ok(())
            }
            Err((suspended, error)) => {
                self.phase = Phase::Held(suspended);
                self.note();
                Err(error)
            }
        }
    }

    /// Writes down what the disk is, where nothing is lost if that cannot be.
    fn note(&mut self) {
        if let Err(error) = self.claim.write(&self.disk) {
            hosted::report(&self.disk.name, &format!("not written down: {error}"));
        }
    }

    /// Holds the disk until it is to go on.
    pub(crate) fn quiesce(&mut self) -> Result<String> {
        self.can_be_spared()?;
        self.hold()?;
        self.disk.quiesced = true;
        self.claim.write(&self.disk)?;
        let said = format!("{} is quiesced", self.thing());
        self.line.tell("quiesced", &said);
        Ok(said)
    }

    /// Goes on.
    pub(crate) fn resume(&mut self) -> Result<String> {
        if self.is_ending() {
            self.hold()?;
            // Where what is below cannot be had again, that is what it is.
            self.disk.quiesced = true;
            self.claim.write(&self.disk)?;
        }
        self.go_on_as_before()?;
        let said = format!("{} is served again", self.thing());
        self.line.tell("resumed", &said);
        Ok(said)
    }

    /// Goes on with the stack that it had.
    pub(crate) fn go_on_as_before(&mut self) -> Result<()> {
        let plan = self.plan.clone();
        self.go_on(&plan, adopt::fit(&self.disk))
    }

    /// Whether it was to be held, and what is below has not let it.
    fn is_ending(&self) -> bool {
        matches!(&self.phase, Phase::Up(front) if front.is_ending())
    }

    /// In what state it is, in a word.
    pub(crate) fn state(&self) -> &'static str {
        match self.phase {
            Phase::Up(_) if self.is_ending() => "ending",
            Phase::Up(_) => "live",
            Phase::Held(_) => "quiesced",
            Phase::Between => "broken",
        }
    }

    /// Goes on with another stack; with the old one where the new one cannot be had.
    pub(crate) fn swap(&mut self, text: &str, labels: &[String], shrink: bool) -> Result<String> {
        let plan = Plan::parse(text, &CATALOG)?.labelled(labels);
        if let Some(place) = hosted::passing(&plan) {
            let reason = "a disk that outlives its server cannot stand on it";
            return Err(Error::new(ErrorKind::Unsupported, place, reason));
        }
        let size = self.fits(&plan, shrink)?;
        self.exchange(&plan)?;
        let said = format!("{} is {} of {}", self.thing(), show_size(size), self.disk.stack);
        self.line.tell("swapped", &said);
        Ok(said)
    }

    fn exchange(&mut self, plan: &Plan) -> Result<()> {
        self.can_be_spared()?;
        let old = self.plan.clone();
        let clients = match &self.phase {
            Phase::Up(front) => front.clients().unwrap_or(0),
            _ => 0,
        };
        if matches!(self.phase, Phase::Up(_)) {
            self.hold()?;
        }
        let Err(error) = self.go_on(plan, Fit::Resized) else { return Ok(()) };
        Err(match self.go_on(&old, adopt::fit(&self.disk)) {
            Ok(()) if clients > 0 => {
                error.next("its clients were disconnected; else nothing was changed")
            }
            Ok(()) => error.next("nothing was changed"),
            Err(second) => {
                let what = format!("the old stack cannot be had again: {second}");
                // Who does not ask this process has to see it, too.
                self.disk.quiesced = true;
                let _ = self.claim.write(&self.disk);
                self.line.tell("quiesced", &what);
                error.next(format!("the disk is quiesced now, for {what}"))
            }
        })
    }

    /// Goes on with what the same stack is by now.
    pub(crate) fn resize(&mut self, shrink: bool) -> Result<String> {
        let plan = self.plan.clone();
        let size = self.fits(&plan, shrink)?;
        if size == self.disk.size {
            return Ok(format!("{} has its size of {} already", self.thing(), show_size(size)));
        }
        let old = self.disk.size;
        self.exchange(&plan)?;
        let said = format!("{}: {} instead of {}", self.thing(), show_size(size), show_size(old));
        self.line.tell("resized", &said);
        Ok(said)
    }

    /// Looks at a stack before anything is done: the size that the disk would have with it.
    fn fits(&self, plan: &Plan, shrink: bool) -> Result<u64> {
        let assembled = assemble(plan, Access::Look)?;
        let limits = assembled.stack.limits();
        if limits.block != self.disk.block {
            let reason = format!("has blocks of {}, the disk of {}", limits.block, self.disk.block);
            return Err(Error::invalid("the stack", reason));
        }
        if limits.size < self.disk.size && !shrink {
            let (new, old) = (show_size(limits.size), show_size(self.disk.size));
            let reason = format!("is smaller ({new}) than the disk ({old})");
            return Err(Error::invalid("the stack", reason)
                .next("shrink what is on the disk first, then --shrink"));
        }
        if limits.size != self.disk.size
            && let Phase::Up(Front::Fuse(_)) | Phase::Held(Suspended::Fuse(_)) = &self.phase
        {
            let (new, old) = (show_size(limits.size), show_size(self.disk.size));
            let reason = format!("is over FUSE and keeps its size of {old}, the stack has {new}");
            return Err(Error::new(ErrorKind::Unsupported, self.thing(), reason)
                .next(format!("swap to linear(..., size={old}), or make the disk anew")));
        }
        Ok(limits.size)
    }
}
