//! Decoders that are not ours, on bytes that anyone may have written.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is an answer, which nobody is to hear of.
    static ANSWERS: Cell<bool> = const { Cell::new(false) };
}

/// What `decode` gives; where it panics, what it said, as an error. Decoders check bounds, and where they do not they panic: a damaged
/// file must be an error, and not the end of the process or a word on the terminal.
pub fn caught<T>(decode: impl FnOnce() -> T) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let told = take_hook();
        set_hook(Box::new(move |panic| {
            if !ANSWERS.get() {
                told(panic);
            }
        }));
    });
    let before = ANSWERS.replace(true);
    let decoded = catch_unwind(AssertUnwindSafe(decode));
    ANSWERS.set(before);
    decoded.map_err(|panic| {
        let said = panic.downcast_ref::<&str>().map(|said| (*said).to_owned());
        let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
        format!("the decoder gave up: {}", said.unwrap_or_default())
    })
}

/// [`caught`], for a decoder that has errors of its own.
pub fn decoded<T, E: std::fmt::Display>(decode: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    caught(decode)?.map_err(|cause| cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoder_that_panics_is_an_error_and_the_next_is_heard() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(decoded(|| "7".parse::<u8>()), Ok(7));
        assert_eq!(decoded(|| "seven".parse::<u8>()), Err("invalid digit found in string".to_owned()));
        assert_eq!(caught(|| panic!("no {}", 7)), Err::<(), _>("the decoder gave up: no 7".to_owned()));
        assert_eq!(
            caught(|| caught(|| panic!("within"))),
            Ok(Err::<(), _>("the decoder gave up: within".to_owned()))
        );
        assert!(!ANSWERS.get(), "what panics from now on is heard");
    }
}
