import logging
import threading

from coda_ray.tracking.outbox import Outbox, is_unreachable, one_line, without_password

WAIT_S = 60.0


def fail(error):
    raise error


def test_calls_are_made_in_order_and_counted():
    done, outbox = [], Outbox("test")
    for number in range(100):
        assert outbox.put(f"record {number}", lambda number=number: done.append(number))
    assert outbox.close(WAIT_S, last=lambda: done.append("last")) == 0
    assert done == [*range(100), "last"]
    assert not outbox.put("late", lambda: done.append("late"))
    assert done[-1] == "last"


def test_a_full_box_refuses_and_counts():
    gate, started, outbox = threading.Event(), threading.Event(), Outbox("test", capacity=2)
    outbox.put("first", lambda: (started.set(), gate.wait(WAIT_S)))
    assert started.wait(WAIT_S)
    assert [outbox.put("more", gate.is_set) for _ in range(4)] == [True, True, False, False]
    gate.set()
    assert outbox.close(WAIT_S) == 2


def test_a_box_that_is_closed_over_a_slow_call_counts_what_is_left():
    gate, outbox = threading.Event(), Outbox("test")
    for _ in range(3):
        outbox.put("slow", lambda: gate.wait(WAIT_S))
    assert outbox.close(0.0) == 3
    gate.set()


def test_each_kind_of_failure_is_logged_once(caplog):
    outbox = Outbox("test")
    for number in range(5):
        outbox.put(f"value {number}", lambda: fail(ValueError("http://user:secret@host is wrong")))
        outbox.put(f"key {number}", lambda: fail(KeyError("k")))
    assert outbox.close(WAIT_S) == 10
    assert outbox.failures == {"ValueError": 5, "KeyError": 5}
    assert [record.getMessage() for record in caplog.records] == [
        "test: value 0 was not sent (ValueError: http://host is wrong)",
        "test: key 0 was not sent (KeyError: 'k')",
    ]


def test_three_lost_connections_in_a_row_end_the_attempts(caplog):
    calls, outbox = [], Outbox("test")
    with caplog.at_level(logging.WARNING):
        for answer in (ConnectionError(), ConnectionError(), None, ConnectionError(), TimeoutError(), OSError(), None):
            outbox.put("record", lambda answer=answer: (calls.append(answer), answer and fail(answer)))
        assert outbox.close(WAIT_S, last=lambda: calls.append("last")) == 6
    assert len(calls) == 6  # the success between them counted; what came after the third in a row was not tried
    assert outbox.gave_up
    assert not outbox.put("record", lambda: None)
    assert "not reached 3 times in a row" in caplog.records[-1].getMessage()


def test_an_answer_comes_back_unless_it_is_late_or_an_error():
    gate, outbox = threading.Event(), Outbox("test")
    assert outbox.ask("number", lambda: 7, WAIT_S) == 7
    assert outbox.ask("error", lambda: fail(ValueError()), WAIT_S) is None
    assert outbox.ask("slow", lambda: gate.wait(WAIT_S), 0.01) is None
    gate.set()
    outbox.close(WAIT_S)


def test_a_wrapped_connection_error_is_recognised():
    wrapped = RuntimeError("API request failed\nlong story")
    wrapped.__context__ = ConnectionError("refused")  # as MLflow raises it
    assert is_unreachable(wrapped)
    assert one_line(wrapped) == "API request failed"
    assert not is_unreachable(ValueError("Changing param values is not allowed"))


def test_a_server_that_was_given_up_can_be_tried_again():
    done, outbox = [], Outbox("test")
    while not outbox.gave_up:
        outbox.ask("lost", lambda: fail(ConnectionError("gone")), 0.1)
    assert not outbox.put("refused", lambda: done.append("refused"))
    outbox.try_again()
    assert outbox.put("sent", lambda: done.append("sent"))
    outbox.close(WAIT_S)
    assert done == ["sent"]


def test_no_sign_of_a_password_is_left():
    for user in ("u:pass@", "u:pa/ss@", "u:p@ss@", "u:p/a@s:s@", "token@", ":pass@", ""):
        assert without_password(f"postgresql://{user}host:5432/db is away") == "postgresql://host:5432/db is away"
    assert without_password("models:/moa@source of s3://b/x") == "models:/moa@source of s3://b/x"
