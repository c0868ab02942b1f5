"""Which tests hold the answer to which threat: `file::function`, below tests/, by the threat's number."""

from __future__ import annotations

HEADER = "checkpoint/test_header.py::test_refused_by_name"
SOURCE = "checkpoint/test_source.py::"
WRITER = "checkpoint/test_writer.py::"
CRASHES = "checkpoint/test_crashes.py::"
CONTRACT = "cli/test_contract.py::"
HERE = "threats/test_threat_table.py::"
KILLS, PROCESSES, UNUSABLE = (f"compress/test_qmoe_{name}.py::" for name in ("kills", "processes", "unusable"))
FUZZ = "threats/test_fuzz.py::test_it_works_or_is_refused_by_name"
PLANTED = f"{HERE}test_without_its_check_it_would_pass"

ROWS: dict[int, tuple[str, ...]] = {
    1: (HEADER, f"{HERE}test_a_cut_shard_is_named_with_both_sizes", PLANTED),
    2: (HEADER, PLANTED),
    3: (HEADER, f"{HERE}test_monstrous_headers_are_refused_quickly_in_little_memory", FUZZ),
    4: (HEADER, PLANTED),
    5: (HEADER, PLANTED),
    6: (HEADER, PLANTED),
    7: (f"{SOURCE}test_tensor_in_two_shards",),
    8: (f"{SOURCE}test_index_never_leads_outside", f"{HERE}test_provenance_never_leads_outside", PLANTED),
    9: (f"{SOURCE}test_index_must_match_the_shards",),
    10: (f"{SOURCE}test_index_must_match_the_shards", f"{SOURCE}test_broken_json_names_the_file", FUZZ),
    11: (f"{SOURCE}test_index_must_match_the_shards", f"{SOURCE}test_tensor_that_the_index_does_not_list", PLANTED),
    12: (f"{SOURCE}test_wrong_total_size_is_only_a_warning",),
    13: (
        f"{SOURCE}test_pickles_are_never_opened",
        f"{SOURCE}test_distributed_checkpoint_is_refused",
        f"{HERE}test_a_pickle_does_not_run_under_any_name",
    ),
    14: (f"{HERE}test_code_in_a_checkpoint_is_said_and_neither_run_nor_copied",),
    15: (
        f"{HERE}test_absurd_numbers_are_refused_before_anything_is_made",
        f"{HERE}test_more_active_experts_than_there_are_is_no_count",
        f"{HERE}test_recipes_of_absurd_sizes_are_refused",
        FUZZ,
        PLANTED,
    ),
    16: (f"{HERE}test_a_gap_between_config_and_weights_is_refused", PLANTED),
    17: (
        "checkpoint/test_nonfinite.py::test_nonfinite_weights_are_refused_by_name_even_if_only_copied",
        f"{UNUSABLE}test_weights_that_are_not_finite_are_named",
        f"{UNUSABLE}test_an_overflow_is_named_with_a_type_that_is_wide_enough",
    ),
    18: (f"{UNUSABLE}test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_said",),
    19: (
        f"{UNUSABLE}test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_said",
        f"{UNUSABLE}test_too_little_text_is_refused",
    ),
    20: (
        f"{WRITER}test_a_failing_disk_leaves_a_resumable_partial",
        f"{CRASHES}test_any_effect_may_fail",
        f"{KILLS}test_on_a_full_disk_what_was_done_is_kept",
        f"{KILLS}test_a_limit_on_files_is_no_bug",
    ),
    21: (f"{WRITER}test_not_enough_disk_is_said_before_anything_is_written",),
    22: (
        f"{WRITER}test_killed_at_random_moments_it_resumes_to_the_same_bytes",
        f"{CRASHES}test_the_process_may_be_killed_at_any_effect",
        f"{CRASHES}test_the_power_may_go_at_any_effect",
        f"{KILLS}test_killed_again_and_again_it_comes_to_the_same_bytes",
        f"{KILLS}test_killed_before_and_after_every_boundary",
    ),
    23: (
        f"{CONTRACT}test_an_interruption_says_how_to_go_on",
        "cli/test_pipelines.py::test_a_signal_in_the_middle_is_resumed",
        f"{KILLS}test_an_interruption_says_how_to_go_on",
    ),
    24: (
        f"{WRITER}test_a_partial_of_another_plan_is_refused",
        f"{WRITER}test_a_source_that_changed_since_is_refused",
        "compress/test_qmoe_command.py::test_other_options_are_refused_before_any_work",
    ),
    25: (
        f"{WRITER}test_a_finished_shard_that_rotted_is_written_again",
        f"{KILLS}test_a_finished_layer_that_rotted_is_made_again",
    ),
    26: (
        f"{WRITER}test_existing_outputs_are_kept_unless_told",
        f"{WRITER}test_output_and_source_never_overlap",
        "compress/test_qmoe_command.py::test_output_and_source_in_one_another_are_refused_before_the_work",
    ),
    27: (
        "checkpoint/test_workers.py::test_processes_that_do_the_same_at_once_do_no_harm",
        "checkpoint/test_workers.py::test_of_two_plans_that_begin_at_once_one_is_refused",
        f"{PROCESSES}test_a_second_process_is_refused_whatever_its_options",
    ),
    28: (
        f"{SOURCE}test_a_source_that_changes_is_noticed",
        f"{HERE}test_a_file_cut_in_mid_run_is_an_error_and_no_signal",
        f"{KILLS}test_a_source_that_changes_meanwhile_is_noticed",
    ),
    29: (
        f"{HERE}test_memory_does_not_grow_with_the_number_of_shards",
        f"{KILLS}test_without_memory_it_is_the_machine_that_could_not",
    ),
    31: (f"{WRITER}test_modes_follow_the_umask", f"{WRITER}test_killed_at_random_moments_it_resumes_to_the_same_bytes"),
    32: (
        f"{CONTRACT}test_a_hostile_name_in_an_error_is_escaped",
        f"{CONTRACT}test_a_hostile_path_is_escaped",
        f"{CONTRACT}test_a_table_in_a_pipe_has_one_line_per_row",
        f"{HERE}test_hostile_names_stay_on_their_line",
        f"{UNUSABLE}test_hostile_names_are_shown_escaped",
    ),
    33: (
        f"{CONTRACT}test_a_reader_that_left_ends_it_quietly_with_141",
        f"{CONTRACT}test_head_ends_a_long_report_quietly_with_141",
    ),
    34: (f"{CONTRACT}test_nan_weights_are_null_in_json", f"{CONTRACT}test_json_has_no_nan"),
    35: (
        f"{CONTRACT}test_a_hub_model_without_a_network_exits_4",
        f"{HERE}test_what_the_hub_says_is_said_without_the_token",
    ),
    37: (f"{HERE}test_a_branch_that_moves_is_resolved_once",),
    38: (f"{PROCESSES}test_when_one_process_of_several_dies_the_others_say_so",),
}
