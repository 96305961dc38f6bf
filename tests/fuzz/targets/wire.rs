//! Messages of any bytes are refused or checked words, whichever service they come to.

#![no_main]

use anello_proto::jobs::{JobName, Submission};
use anello_proto::ring::{Epoch, Hello, Pace, Stance};
use anello_proto::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 9 {
        0 => {
            let Ok(hello) = v1::Hello::decode(bytes) else { return };
            let _ = Hello::try_from(hello);
        }
        1 => {
            let Ok(stance) = v1::Stance::decode(bytes) else { return };
            if let Ok(stance) = Stance::try_from(stance) {
                let again = Stance::try_from(v1::Stance::from(&stance)).expect("our own words are right");
                assert!(again == stance);
            }
        }
        2 => {
            let Ok(order) = v1::ToWorker::decode(bytes) else { return };
            let _: Result<(Epoch, _), _> = order.try_into();
        }
        3 => {
            let Ok(request) = v1::SubmitRequest::decode(bytes) else { return };
            let _ = Submission::try_from(request);
        }
        4 => {
            let Ok(request) = v1::ScaleRequest::decode(bytes) else { return };
            let _: Result<(JobName, u32), _> = request.try_into();
        }
        5 => {
            let Ok(pace) = v1::Pace::decode(bytes) else { return };
            let _ = Pace::try_from(pace);
        }
        6 => {
            let Ok(failed) = v1::Failed::decode(bytes) else { return };
            let _ = failed.checked();
        }
        7 => {
            let Ok(report) = v1::StepReport::decode(bytes) else { return };
            let record = anello_coordinator::record_of(report);
            let _ = (record.kl(), record.depth());
            anello_store::metrics::to_batch(&[record]);
        }
        _ => {
            let Ok(request) = v1::LogsRequest::decode(bytes) else { return };
            let _: Result<(JobName, bool, u64), _> = request.try_into();
        }
    }
});
