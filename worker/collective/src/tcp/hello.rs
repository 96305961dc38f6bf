//! What two workers say before they belong together. Pure.
//!
//! ```text
//! magic "ANELLOH1" | length (u32) | CRC-32 of the rest (u32) | JSON of a `Greeting`, up to 8 KiB
//! ```

use std::io::{ErrorKind, Read};

use serde::{Deserialize, Serialize};

use crate::Shape;

const MAGIC: [u8; 8] = *b"ANELLOH1";
const PREFIX_BYTES: usize = 16;

/// Bytes of a greeting at most. Its three texts have up to [`TEXT_BYTES_MAX`] each, six times that where every byte is
/// escaped: 4608 together; names and numbers are some hundred.
const GREETING_BYTES_MAX: usize = 8 << 10;

/// Bytes of a job's name, a config digest or a build at most.
pub(crate) const TEXT_BYTES_MAX: usize = 256;

/// Which of the two connections of a pair it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Channel {
    /// Messages and last words.
    Control,
    /// Blocks.
    Data,
}

/// A worker, as it introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub job: String,
    pub generation: u64,
    pub rank: u32,
    /// The rank it wants to speak with.
    pub to: u32,
    pub channel: Channel,
    pub config_digest: String,
    pub build: String,
    pub members: u32,
    /// CRC-32 of the ranges of lanes.
    pub lanes: u32,
    pub blocks: u32,
    pub block_len: u64,
}

/// What goes over a new connection, once each way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Greeting {
    /// The dialer's.
    Hello(Hello),
    /// The answer: welcome.
    Welcome(Hello),
    /// The answer: not now, we are not in that generation yet.
    Later,
    /// The answer: no, and why.
    Refused(String),
}

/// CRC-32 of the ranges of lanes and of who owns blocks, so that a hello has a bounded size.
pub(crate) fn lanes_checksum(shape: &Shape) -> u32 {
    let ranges = shape.ranges.iter().flat_map(|range| [range.start, range.end]);
    let bytes: Vec<u8> = ranges.chain([shape.owners]).flat_map(u32::to_le_bytes).collect();
    crc32fast::hash(&bytes)
}

impl Hello {
    /// All in which members of one generation must agree and these two do not: with `theirs` and ours.
    pub fn differences(&self, theirs: &Self) -> String {
        let mut found = Vec::new();
        let mut compare = |what: &str, theirs: &dyn std::fmt::Debug, ours: &dyn std::fmt::Debug| {
            let (theirs, ours) = (format!("{theirs:?}"), format!("{ours:?}"));
            if theirs != ours {
                found.push(format!("{what} {theirs} there, {ours} here"));
            }
        };
        compare("job", &theirs.job, &self.job);
        compare("generation", &theirs.generation, &self.generation);
        compare("config digest", &theirs.config_digest, &self.config_digest);
        compare("build", &theirs.build, &self.build);
        compare("members", &theirs.members, &self.members);
        compare("checksum of lane ranges", &theirs.lanes, &self.lanes);
        compare("blocks", &theirs.blocks, &self.blocks);
        compare("block length", &theirs.block_len, &self.block_len);
        compare("rank dialed", &theirs.to, &self.rank);
        compare("rank dialing", &theirs.rank, &self.to);
        found.join(", ")
    }
}

/// A greeting as bytes.
pub(crate) fn encode(greeting: &Greeting) -> Vec<u8> {
    let mut json = serde_json::to_vec(greeting).expect("strings and numbers have a JSON form");
    if json.len() > GREETING_BYTES_MAX {
        // Only a refusal that quotes two long hellos gets here.
        let short = Greeting::Refused("too much differs to say".into());
        json = serde_json::to_vec(&short).expect("a string has a JSON form");
    }
    let length = json.len() as u32;
    [&MAGIC[..], &length.to_le_bytes(), &crc32fast::hash(&json).to_le_bytes(), &json].concat()
}

/// Reads one greeting, a piece at a time.
#[derive(Debug, Default)]
pub(crate) struct GreetingReader {
    bytes: Vec<u8>,
}

/// Why the bytes of a connection are no greeting.
#[derive(Debug)]
pub(crate) enum NoGreeting {
    /// Closed or failed.
    Io(std::io::Error),
    /// Something else speaks there.
    Garbage,
}

impl GreetingReader {
    /// The greeting, when all of it is there. Holds at most 8 KiB + 16 bytes and reads not one byte beyond it.
    pub fn read(&mut self, io: &mut impl Read) -> Result<Option<Greeting>, NoGreeting> {
        loop {
            let due = match self.bytes.first_chunk::<PREFIX_BYTES>() {
                None => PREFIX_BYTES,
                Some(prefix) => {
                    let length = u32::from_le_bytes(*prefix[8..].first_chunk().expect("16 bytes")) as usize;
                    if length > GREETING_BYTES_MAX {
                        return Err(NoGreeting::Garbage);
                    }
                    PREFIX_BYTES + length
                }
            };
            let have = self.bytes.len();
            // What is no greeting is known by its first bytes, not after a time-out.
            if self.bytes[..have.min(8)] != MAGIC[..have.min(8)] {
                return Err(NoGreeting::Garbage);
            }
            if have > PREFIX_BYTES && have == due {
                let json = &self.bytes[PREFIX_BYTES..];
                if self.bytes[12..16] != crc32fast::hash(json).to_le_bytes() {
                    return Err(NoGreeting::Garbage);
                }
                return serde_json::from_slice(json).map(Some).map_err(|_| NoGreeting::Garbage);
            }
            if have == due && have == PREFIX_BYTES {
                return Err(NoGreeting::Garbage);
            }
            self.bytes.resize(due, 0);
            let read = io.read(&mut self.bytes[have..]);
            self.bytes.truncate(have + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(NoGreeting::Io(ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(NoGreeting::Io(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            job: "a".into(),
            generation: 1,
            rank: 0,
            to: 1,
            channel: Channel::Data,
            config_digest: "c0".into(),
            build: "b".into(),
            members: 2,
            lanes: 5,
            blocks: 3,
            block_len: 4,
        }
    }

    #[test]
    fn differences_name_all_and_both_values() {
        let theirs = Hello { config_digest: "c1".into(), blocks: 4, rank: 1, to: 0, ..hello() };
        assert_eq!(
            hello().differences(&theirs),
            r#"config digest "c1" there, "c0" here, blocks 4 there, 3 here"#
        );
        assert_eq!(hello().differences(&Hello { rank: 1, to: 0, ..hello() }), "");
    }

    #[test]
    fn the_longest_hello_fits() {
        let text = "\u{1}".repeat(TEXT_BYTES_MAX);
        let longest = Hello {
            job: text.clone(),
            config_digest: text.clone(),
            build: text,
            generation: u64::MAX,
            rank: u32::MAX,
            to: u32::MAX,
            members: u32::MAX,
            lanes: u32::MAX,
            blocks: u32::MAX,
            block_len: u64::MAX,
            channel: Channel::Control,
        };
        let greeting = Greeting::Welcome(longest);
        let read = GreetingReader::default().read(&mut encode(&greeting).as_slice());
        assert_eq!(read.unwrap(), Some(greeting));
    }

    proptest! {
        #[test]
        fn a_greeting_comes_through_in_any_pieces(job in ".{0,60}", size in 1usize..40) {
            let greeting = Greeting::Hello(Hello { job, ..hello() });
            let bytes = [encode(&greeting), b"next".to_vec()].concat();
            let mut reader = GreetingReader::default();
            let (mut at, mut read) = (0, None);
            while read.is_none() {
                let mut piece = &bytes[at..(at + size).min(bytes.len())];
                let before = piece.len();
                match reader.read(&mut piece) {
                    Ok(found) => read = found,
                    Err(NoGreeting::Io(_)) => {} // the end of the piece
                    Err(NoGreeting::Garbage) => prop_assert!(false, "taken for garbage"),
                }
                at += before - piece.len();
            }
            prop_assert_eq!(read, Some(greeting));
            prop_assert_eq!(&bytes[at..], b"next");
        }

        /// Any bytes: no panic, no greeting, no more memory than the bound.
        #[test]
        fn any_bytes_are_no_greeting(bytes in prop::collection::vec(any::<u8>(), 0..100), begin in 0usize..17) {
            let sound = encode(&Greeting::Later);
            let all = [&sound[..begin.min(sound.len())], &bytes].concat();
            let mut reader = GreetingReader::default();
            if all != sound {
                prop_assert!(reader.read(&mut all.as_slice()).is_err());
            }
            prop_assert!(reader.bytes.capacity() <= 2 * (PREFIX_BYTES + GREETING_BYTES_MAX));
        }
    }
}
