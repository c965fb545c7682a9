//! Answers for requests that wait for their time, and for rates that are changed under way.

use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError};

use devsplice_core::prelude::*;

use super::{KEYS, Throttle};

/// Longest sleep before a change of the rates is noticed.
const NAP_NS: u64 = 100_000_000;

impl Throttle {
    /// Waits for a request's time.
    async fn wait(&self, io: &Io, meta: &dyn Meta) -> Result<(), Errno> {
        loop {
            let (wait_ns, changes) = self.reserve(io, meta.now_ns());
            let due = meta.now_ns().saturating_add(wait_ns);
            loop {
                let left_ns = due.saturating_sub(meta.now_ns());
                if left_ns == 0 {
                    return Ok(());
                }
                meta.sleep(left_ns.min(NAP_NS)).await?;
                if self.pace.lock().unwrap_or_else(PoisonError::into_inner).changes != changes {
                    break;
                }
            }
        }
    }
}

impl Live for Throttle {
    fn resolve(self: Arc<Self>, io: Io, meta: Rc<dyn Meta>) -> Slow {
        Box::pin(async move {
            self.waiting.fetch_add(1, SeqCst);
            self.waited.fetch_add(1, SeqCst);
            self.wait(&io, &*meta).await?;
            self.waiting.fetch_sub(1, SeqCst);
            self.passes.give(io);
            Ok(())
        })
    }

    fn command(
        self: Arc<Self>,
        words: Vec<String>,
        _: Rc<dyn Meta>,
    ) -> Slow<Result<String, String>> {
        let pair = |word: &String| word.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        let given: Option<Vec<_>> = words.iter().skip(1).map(pair).collect();
        let answer = match (words.first().map(String::as_str), given) {
            (Some("set"), Some(given)) => Args::new("throttle", KEYS, &given)
                .and_then(|args| self.set(&args))
                .map(|()| "set".to_owned())
                .map_err(|error| error.to_string()),
            _ => Err("commands: set KEY=VALUE... (the keys of the driver)".to_owned()),
        };
        Box::pin(std::future::ready(Ok(answer)))
    }

    fn status(&self) -> Vec<(&'static str, Value)> {
        let rates = self.rates.iter().zip(KEYS).map(|(rate, key)| (key.name, &rate.rate));
        let set = rates.filter(|(_, rate)| rate.load(SeqCst) > 0);
        set.chain([
            ("burst_ns", &self.burst_ns),
            ("waiting", &self.waiting),
            ("waited", &self.waited),
        ])
        .map(|(name, number)| (name, Value::Number(number.load(SeqCst))))
        .collect()
    }
}
