//! One suite for every implementation of `Collective`, and what only TCP can get wrong.

mod fabric;
mod failures;
mod generations;
mod silence;
mod strangers;
mod sums;
mod untrusted;
mod wire;

use fabric::{InProcesses, OverTcp, OverTls};

/// Runs each test of the suite over each implementation.
macro_rules! suite {
    ($($module:ident :: $test:ident),* $(,)?) => {
        mod in_process {
            use super::*;
            $(#[test] fn $test() { $module::$test::<InProcesses>(); })*
        }
        mod tcp {
            use super::*;
            $(#[test] fn $test() { $module::$test::<OverTcp>(); })*
        }
        mod tls {
            use super::*;
            $(#[test] fn $test() { $module::$test::<OverTls>(); })*
        }
    };
}

suite! {
    sums::any_ring_has_the_bits_of_one_worker,
    sums::random_rings_have_the_bits_of_one_worker,
    sums::blocks_may_become_ready_in_any_order,
    sums::blocks_that_are_not_summed_stay_as_they_are,
    sums::buffers_larger_than_sockets_do_not_deadlock,
    sums::messages_come_in_the_order_of_ranks,
    sums::mistakes_of_the_caller_change_nothing,
    failures::a_member_that_dies_in_a_reduction_is_named_by_all,
    failures::a_member_that_dies_in_a_gather_is_named_by_all,
    failures::who_left_after_its_last_word_owes_nothing,
    failures::a_failure_after_an_operation_leaves_it_whole,
    failures::an_abort_ends_a_blocked_call,
    failures::an_abort_ends_a_call_that_waits_for_a_frozen_member,
    failures::an_abort_before_a_call_ends_it,
    failures::another_step_is_refused,
    failures::another_operation_is_refused,
    failures::a_reduction_given_up_ends_the_ring,
    failures::any_deaths_leave_right_sums_and_right_names,
}
