"""What the unit suite leaves out where it runs on Windows, and why. One list; keep it short.

A name is FILE::TEST, or FILE::TEST[CASE] for one case of it.
"""

# ruff: noqa: E501 - some names are long

_SIGNALS = "POSIX signals, sessions and process groups; test_windows.py has their likes"
_DEAF = "a process without a console cannot be asked to end there, so none can refuse"
_LINKS = "symbolic links are for administrators there, and Wine 8 makes none"
_NAMES = "no name of a file holds a quote there"
_COLON = "llama-server splits this value at each colon: no path with a drive fits"
_PROC = "it looks into /proc"
_BENCH = "make bench is for Linux: wrk, nginx, and a load that selects as Linux does"
_LIMITS = "its limits are those of POSIX; a job object has others, and Wine keeps few of them"
_SLOW = "it takes minutes under Wine"
_TIME = "its time limits are too short for Wine"
_SCRIPTS = "Windows starts no scripts, and who watches a host is no Windows"
_HANDLES = "there is no limit on a process's handles to run into there"

REASONS = {
    "test_bench_watch.py::test_the_shell_of_the_host_is_known_by_what_it_makes_of_a_variable": (
        _SCRIPTS
    ),
    "test_bench_watch.py::test_a_host_that_is_no_windows_is_refused": _SCRIPTS,
    "test_bench_watch.py::test_exit_code_255_is_the_lines_own_and_no_commands": _SCRIPTS,
    "test_bench_watch.py::test_every_call_is_without_input_and_with_limits": _SCRIPTS,
    "test_bench_journal.py::test_on_a_full_disk_nothing_half_is_left": (
        "Windows has no limit on the size of a file"
    ),
    "test_eval_execution.py::test_an_honest_program_passes[it runs another program]": (
        "Wine may start one of its own beside it, which stays"
    ),
    "test_eval_execution.py::test_a_program_ends_with_who_asked_for_it": _PROC,
    "test_eval_execution.py::test_a_trick_with_the_system_fails": _SIGNALS,
    "test_eval_execution.py::test_it_fails_too_where_there_are_no_namespaces": _SIGNALS,
    "test_eval_execution.py::test_the_canonical_solutions_pass": _SLOW,
    "test_eval_execution.py::test_empty_bodies_fail": _SLOW,
    "test_eval_execution.py::test_the_memory_of_all_its_processes_counts": _LIMITS,
    "test_eval_execution.py::test_who_takes_too_much_fails[fills the disk with one file]": _LIMITS,
    "test_eval_execution.py::test_who_takes_too_much_fails[nests folders]": _LIMITS,
    "test_eval_execution.py::test_who_takes_too_much_fails[takes memory]": _LIMITS,
    "test_eval_execution.py::test_who_takes_too_much_fails[starts threads]": _LIMITS,
    "test_winsvc.py::test_a_child_gets_a_null_input_a_session_one_pipe_and_nothing_else_of_ours": (
        _SIGNALS
    ),
    "test_winsvc.py::test_kill_ends_who_is_deaf_to_terminate": _DEAF,
    "test_winsvc.py::test_terminate_reaches_what_the_child_started": _SIGNALS,
    "test_winsvc.py::test_a_name_with_blanks_and_brackets_does_not_confuse_the_stamp": _PROC,
    "test_winsvc.py::test_a_number_that_belongs_to_another_program_by_now_is_left_alone": (
        "it reckons with the stamps of Linux; the test before it shows the same"
    ),
    "test_shutdown.py::test_a_child_that_ignores_terminate_is_killed_after_the_grace_time": _DEAF,
    "test_shutdown.py::test_a_stop_under_way_is_waited_for": _DEAF,
    "test_shutdown.py::test_a_third_signal_changes_nothing": _DEAF,
    "test_pool.py::test_a_child_that_ignores_terminate_is_killed_after_the_grace_time": _DEAF,
    "test_pool.py::test_a_larger_one_that_is_being_stopped_is_not_waited_for": _DEAF,
    "test_stuck.py::test_the_place_that_was_made_is_not_given_away_before_the_second_try_is_over": (
        _DEAF
    ),
    "test_faults.py::test_a_fault_is_told_and_mended[hangs, prefill, the whole process]": _SIGNALS,
    "test_faults.py::test_a_fault_is_told_and_mended[hangs, stopping]": _SIGNALS,
    "test_faults.py::test_a_fault_is_told_and_mended[ignores terminate, stopping]": _DEAF,
    "test_faults.py::test_a_fault_is_told_and_mended[floods, prefill]": _TIME,
    "test_steps.py::test_a_step_is_seen_wherever_its_stream_is_split[1]": _TIME,
    "test_steps.py::test_a_step_is_spared_no_longer_than_is_fair_to_who_waits": _TIME,
    "test_limits.py::test_a_flood_of_connections_with_few_descriptors_is_survived": _HANDLES,
    "test_limits.py::test_a_start_for_which_descriptors_are_too_few_is_told_so_however_far_it_came": (
        _HANDLES
    ),
    "test_limits.py::test_a_request_to_a_running_process_is_told_so_too": _HANDLES,
    "test_framing.py::test_who_announced_its_last_request_is_not_waited_for": (
        "a reset that has come shows in the next call only there"
    ),
    "test_limits.py::test_a_slow_reader_holds_only_its_own_stream_and_no_memory": _PROC,
    "test_limits.py::test_the_daemon_keeps_to_one_processor_and_its_children_have_all": _PROC,
    "test_limits.py::test_the_daemon_runs_everywhere_if_it_shall": _PROC,
    "test_limits.py::test_of_one_processor_nothing_is_taken_away": _PROC,
    "test_bench.py::test_what_is_not_installed_is_named": _BENCH,
    "test_bench.py::test_a_refused_stream_is_a_fault": _BENCH,
    "test_validator.py::test_an_opened_path_becomes_the_real_one[--lora-in.gguf-{}/a.gguf]": _LINKS,
    "test_validator.py::test_the_opened_folder_may_itself_be_a_link": _LINKS,
    'test_validator.py::test_an_opened_path_becomes_the_real_one[--lora-"q""x.gguf"-"{}/q""x.gguf"]': (
        _NAMES
    ),
    'test_validator.py::test_an_opened_path_becomes_the_real_one[--lora-q"x.gguf-"{}/q""x.gguf"]': (
        _NAMES
    ),
    "test_validator.py::test_an_opened_path_becomes_the_real_one[--lora-scaled-a.gguf:0.50-{}/a.gguf:0.5]": (
        _COLON
    ),
    "test_validator.py::test_an_opened_path_becomes_the_real_one[--lora-scaled-a.gguf:1,in.gguf:-2-{}/a.gguf:1,{}/a.gguf:-2]": (
        _COLON
    ),
    "test_validator_properties.py::test_no_hostile_input_raises_anything_but_a_refusal": _SLOW,
}
