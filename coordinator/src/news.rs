//! Who keeps several jobs is woken when there is news of one, and asks no other how it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Whether there is news of a job, and who is woken by it.
#[derive(Clone, Debug, Default)]
pub struct News {
    fresh: Arc<AtomicBool>,
    wake: Arc<Notify>,
}

impl News {
    /// None yet; `wake` is shared by all jobs of one keeper.
    pub fn none(wake: Arc<Notify>) -> Self {
        Self { fresh: Arc::default(), wake }
    }

    /// There is news. Told often, it wakes once.
    pub fn tell(&self) {
        if !self.fresh.swap(true, Ordering::AcqRel) {
            self.wake.notify_one();
        }
    }

    /// Whether there is, since it was asked last.
    pub fn take(&self) -> bool {
        self.fresh.swap(false, Ordering::AcqRel)
    }
}

/// The job's end of it: that it ends is news, too, however it does.
#[derive(Debug)]
pub(crate) struct Herald(pub News);

impl Drop for Herald {
    fn drop(&mut self) {
        self.0.tell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_together_wakes_once_and_the_end_is_news() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let wake = Arc::new(Notify::new());
        let news = News::none(wake.clone());
        let is_woken = || {
            let soon = std::time::Duration::ZERO;
            runtime.block_on(async { tokio::time::timeout(soon, wake.notified()).await.is_ok() })
        };
        assert!(!is_woken() && !news.take());
        news.tell();
        assert!(is_woken());
        news.tell();
        assert!(!is_woken() && news.take() && !news.take());
        drop(Herald(news.clone()));
        assert!(is_woken() && news.take());
    }
}
