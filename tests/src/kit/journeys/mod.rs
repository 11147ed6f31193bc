//! Journeys: sequences of packets with what has to become of each. They are written once; the host
//! takes them alone, and the kernel beside it.

pub mod affinity;
pub mod connection;
pub mod cookie;
pub mod fragment;
pub mod history;
pub mod hostile;
pub mod icmp;
pub mod limits;
pub mod local;
pub mod mtu;
pub mod ports;
pub mod proxied;
pub mod refuse;
pub mod schedule;
pub mod sources;
pub mod tc;
pub mod tcp;
pub mod udp;
pub mod vlan;

/// Calls a macro with `module { journey, … }` for all journeys.
#[macro_export]
macro_rules! each_journey {
    ($call:ident) => {
        $call! {
            tcp { whole_life, promotion_and_demotion, retransmitted_syn_stays, late_acknowledgment_does_not_promote, half_close_goes_on, port_reuse_after_close_begins_anew, reset_ends, blind_reset_changes_nothing, strange_reset_in_the_handshake_changes_nothing, late_segments_of_an_earlier_backend, round_robin_is_exact, options_and_padding, terminating_backend_keeps_flows, route_change_keeps_way_back }
            udp { question_and_answer, becomes_a_stream, unanswered_stays_transient, expires, one_way_session_keeps_its_port, without_checksum, moves_on_from_a_gone_backend, extension_headers }
            refuse { no_backend, unknown_connection, gone_backend, hops_run_out, vlan_tagged, unanswerable }
            icmp { towards_clients, towards_backends, short_quotes, not_ours }
            fragment { datagram, without_first, hops_run_out, fragmented_tcp_with_shifted_timestamps }
            vlan { pop_and_push, keep, two_tags, priority_tag }
            ports { one_client_never_collides, fifty_clients, exhaustion, lost_port_of_another, lost_half_is_rebuilt, rebuilt_half_of_a_reused_backend_index }
            history { timestamps_are_shifted, own_port_again, quiet_time, without_timestamps }
            sources { only_those_allowed, whole_family, nested, thousands, no_answer_to_others, connections_outlive_permission }
            affinity { sticks, expires, is_of_one_client_and_service, leaves_backends_that_are_gone, leaves_one_out_of_reach, keeps_others_in_turn, off_and_on }
            limits { burst_then_rate, known_flows_are_not_counted, is_of_one_client_and_service, what_counts, years_pass, off_and_on }
            schedule { same_backend_in_any_layout, hashed_clients_stick, idle_backends_take_turns, fewest_open_connections, weights_divide, out_of_reach_comes_last, others_stand_in_for_one_out_of_reach, many_backends, endings_are_counted }
            local { whole_life, mixed_with_remote, last_hop, gone_backend, lost_half_is_rebuilt, same_tuple_by_another_vip, same_tuple_directly, direct_connection_afterwards, late_segments_of_an_earlier_backend, port_reuse, datagrams, stream, fragments, icmp_errors, others_leave_untouched, needs_no_neighbour }
            mtu { towards_backends, towards_clients, quoted }
            tc { handed_over, nobody_to_hand_over_to, sticks, way_changes }
            cookie { whole_life, strange_reset, segment_sizes, losses, forgeries, replay, backend_says_no, syn_again, port_reuse, lost_halves, quoted, off_again, the_usual_way }
            proxied { new_ones_pass, old_ones_finish, ranges_hold_again }
            hostile { not_ours, malformed, misconfigured }
        }
    };
}
