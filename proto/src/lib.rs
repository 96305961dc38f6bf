//! The wire of Anello: the `.proto` files, the code generated from them, and the checked values that they carry.
//!
//! [`ring`] has the words that coordinator and workers speak, [`jobs`] those of users; [`convert`] turns them into messages and back, and is the
//! one place where what comes in is checked. A message is at most 4 MiB (gRPC's own limit), as a [`v1::Formation`] of 4096
//! members at about 200 bytes each and a [`v1::StateChunk`] of 3 MiB are, with two exceptions: a request of a user is at most
//! 2 MiB, and a word of a worker at most 48 MiB, since a [`v1::Stance`] lists parts of checkpoints.

pub mod convert;
pub mod jobs;
pub mod ring;

/// The generated messages, clients and servers of package `anello.v1`.
#[allow(missing_docs, reason = "generated from the .proto files, where everything is commented")]
pub mod v1 {
    tonic::include_proto!("anello.v1");
}

/// The `.proto` files as a `FileDescriptorSet`, for the reflection service.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/anello.bin"));

#[cfg(test)]
mod tests {
    /// What a field is, and its unit, is said at the field itself.
    #[test]
    fn every_field_has_words_of_its_own() {
        for (name, text) in [
            ("jobs", include_str!("../anello/v1/jobs.proto")),
            ("ring", include_str!("../anello/v1/ring.proto")),
            ("peers", include_str!("../anello/v1/peers.proto")),
        ] {
            let lines: Vec<&str> = text.lines().map(str::trim).collect();
            let fields = lines.windows(2).filter(|pair| {
                let is_field = pair[1].split_once(" = ").is_some_and(|(_, number)| {
                    number.strip_suffix(';').is_some_and(|number| number.parse::<u32>().is_ok())
                });
                is_field && pair[1].split(' ').count() >= 4
            });
            let (with, without): (Vec<_>, Vec<_>) = fields.partition(|pair| pair[0].starts_with("//"));
            assert!(with.len() > 20, "{name}: {} fields", with.len());
            assert!(without.is_empty(), "{name}.proto: {without:?}");
        }
    }
}
