//! Answers for the shape of the suite: groups of tests, what they need, and skipping with a reason.

use std::sync::{PoisonError, RwLock};

use libtest_mimic::{Completion, Failed, Trial};

use crate::host::Kind;

/// Why a test cannot run here.
#[derive(Clone, Debug)]
pub struct Skip(pub String);

/// Done, or skipped; what fails panics.
pub type Outcome = Result<(), Skip>;

/// The outcome of a test that cannot run here.
///
/// # Errors
/// Always: that is how a test ends early.
pub fn skip<T>(reason: impl Into<String>) -> Result<T, Skip> {
    Err(Skip(reason.into()))
}

/// Tests that change what the whole machine shares run alone.
static MACHINE: RwLock<()> = RwLock::new(());

type Body = Box<dyn FnOnce() -> Outcome + Send>;

struct Test {
    name: String,
    alone: bool,
    body: Body,
}

/// Tests under one name. What all of them need is asked once.
pub struct Group {
    name: String,
    gate: Outcome,
    tests: Vec<Test>,
}

impl Group {
    /// A group that runs if `gate` is open.
    #[must_use]
    pub fn new(name: &str, gate: Outcome) -> Group {
        Group { name: name.to_owned(), gate, tests: Vec::new() }
    }

    /// The group of all tests of one front end.
    #[must_use]
    pub fn of(kind: Kind) -> Group {
        Group::new(&kind.name(), kind.gate())
    }

    /// Adds a test.
    pub fn add(&mut self, name: &str, body: impl FnOnce() -> Outcome + Send + 'static) {
        self.tests.push(Test { name: name.to_owned(), alone: false, body: Box::new(body) });
    }

    /// Adds a test that shares the machine with no other.
    pub fn alone(&mut self, name: &str, body: impl FnOnce() -> Outcome + Send + 'static) {
        self.tests.push(Test { name: name.to_owned(), alone: true, body: Box::new(body) });
    }
}

/// The groups as the harness takes them. A group whose gate is closed is one skipped test.
#[must_use]
pub fn trials(groups: Vec<Group>) -> Vec<Trial> {
    let mut all = Vec::new();
    for Group { name, gate, tests } in groups {
        match gate {
            Ok(()) => all.extend(tests.into_iter().map(|test| trial(&name, test))),
            Err(Skip(reason)) => {
                let reason = format!("{reason} ({} tests)", tests.len());
                let body = move || Ok(Completion::ignored_with(reason));
                all.push(Trial::ignorable_test(format!("{name}::everything"), body));
            }
        }
    }
    all
}

fn trial(group: &str, test: Test) -> Trial {
    let Test { name, alone, body } = test;
    Trial::ignorable_test(format!("{group}::{name}"), move || {
        let outcome = if alone {
            let _machine = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
            body()
        } else {
            let _machine = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
            body()
        };
        match outcome {
            Ok(()) => Ok::<_, Failed>(Completion::Completed),
            Err(Skip(reason)) => Ok(Completion::ignored_with(reason)),
        }
    })
}
