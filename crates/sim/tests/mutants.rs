//! Answers for the simulator itself: bugs put in on purpose are found, and as what they are.
#![forbid(unsafe_code)]

use devsplice_sim::{Kind, Mutant, Options, run};

/// Seeds within which each bug must be found.
const SEEDS: u64 = 50_000;

/// Runs seeds until one fails; how many were needed, and what it failed with.
fn find(mutant: Mutant) -> Option<(u64, Kind, String)> {
    (0..SEEDS).find_map(|seed| {
        let report = run(seed, Options { mutant: Some(mutant), ..Options::default() });
        report.failure.map(|failure| (seed + 1, failure.kind, failure.to_string()))
    })
}

/// What a bug may show itself as.
fn kinds(mutant: Mutant) -> &'static [Kind] {
    match mutant {
        Mutant::FlushEarly
        | Mutant::FuaIgnored
        | Mutant::FlushTooOld
        | Mutant::FlushOneLeg
        | Mutant::CacheHidden => &[Kind::LostData],
        Mutant::ShortRead | Mutant::FarReplyCut => &[Kind::Unfilled],
        Mutant::ZeroesOffered => &[Kind::Contract],
        Mutant::WatchdogSilent => &[Kind::Silent],
        Mutant::AckEarly | Mutant::FarEarly => &[Kind::StalePages],
        Mutant::ErrorSwallowed => &[Kind::WrongResult],
        Mutant::CompletionLost | Mutant::FarSilence => &[Kind::Hang],
        Mutant::FarForced | Mutant::FarFlushLost => &[Kind::LostData, Kind::WrongData],
        Mutant::StripeSwapped | Mutant::LinearOff => &[Kind::Misplaced, Kind::LostData],
        Mutant::LogLost
        | Mutant::StateLost
        | Mutant::MetaNotDurable
        | Mutant::MetaFlushSkipped
        | Mutant::CopySkipped
        | Mutant::GraceSkipped => &[Kind::WrongData, Kind::Misplaced, Kind::Build],
        Mutant::WriteDropped
        | Mutant::FarHeldLost
        | Mutant::FarCookie
        | Mutant::FarOldWrites
        | Mutant::ShortWrite
        | Mutant::ReadOff
        | Mutant::Echo
        | Mutant::DiscardNeighbour
        | Mutant::ZeroesIgnored
        | Mutant::MirrorOneLeg
        | Mutant::ZeroesDropped
        | Mutant::HalfTwice
        | Mutant::ReadsZero => &[Kind::WrongData, Kind::Misplaced, Kind::LostData],
    }
}

#[test]
fn every_bug_is_found_as_what_it_is() {
    for mutant in Mutant::ALL {
        let found = find(*mutant);
        let Some((seeds, kind, text)) = found else {
            panic!("{mutant:?} was not found within {SEEDS} seeds")
        };
        println!("{mutant:?}: {seeds} seeds, {text}");
        assert!(kinds(*mutant).contains(&kind), "{mutant:?} was found as {text}");
    }
}
