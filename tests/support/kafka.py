"""A Kafka cluster for tests that is nobody's of this house: librdkafka's mock cluster, with its real protocol on real
ports, out of the wheel of `confluent-kafka`.

    python kafka.py BROKERS PARTITIONS

has a topic `audit`, prints the bootstrap servers, then obeys lines on its input, each answered by one line:

    down | up           all brokers stop, or listen again: what they hold stays
    leader P B          broker B leads partition P from now on
    error CODE          the next batch is answered with this error
    read                everything in the topic: a JSON list of [partition, key, value]
"""

import ctypes
import glob
import json
import os
import sys
import threading
import time

import confluent_kafka as kafka

PRODUCE = 0  # the number of the request in Kafka's protocol
POINTER, INT = ctypes.c_void_p, ctypes.c_int


def library():
    beside = os.path.join(os.path.dirname(kafka.__file__), "..", "confluent_kafka.libs")
    lib = ctypes.CDLL(glob.glob(os.path.join(beside, "librdkafka-*.so*"))[0])
    for name, gives, takes in [
        ("conf_new", POINTER, []),
        ("new", POINTER, [INT, POINTER, ctypes.c_char_p, ctypes.c_size_t]),
        ("mock_cluster_new", POINTER, [POINTER, INT]),
        ("mock_cluster_bootstraps", ctypes.c_char_p, [POINTER]),
        ("mock_topic_create", INT, [POINTER, ctypes.c_char_p, INT, INT]),
        ("mock_broker_set_down", INT, [POINTER, ctypes.c_int32]),
        ("mock_broker_set_up", INT, [POINTER, ctypes.c_int32]),
        ("mock_partition_set_leader", INT, [POINTER, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32]),
        ("mock_push_request_errors_array", None, [POINTER, ctypes.c_int16, ctypes.c_size_t, POINTER]),
    ]:
        function = getattr(lib, f"rd_kafka_{name}")
        function.restype, function.argtypes = gives, takes
    return lib


class Reader:
    """Reads along, because the cluster keeps no more than five megabytes of a partition."""

    def __init__(self, servers, partitions):
        settings = {"bootstrap.servers": servers, "group.id": "test", "auto.offset.reset": "error"}
        settings |= {"reconnect.backoff.max.ms": 100, "fetch.error.backoff.ms": 50, "fetch.wait.max.ms": 50}
        self.consumer, self.asker = kafka.Consumer(settings), kafka.Consumer(settings)
        self.places = [kafka.TopicPartition("audit", number, 0) for number in range(partitions)]
        self.consumer.assign(self.places)
        self.found = []
        self.lock = threading.Lock()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            message = self.consumer.poll(0.2)
            if message is not None and message.error() is None:
                with self.lock:
                    self.found.append([message.partition(), message.key().decode(), message.value().decode()])

    def all(self):
        """What there is once as many have come as the brokers say that there are."""
        ends = [self.asker.get_watermark_offsets(place, timeout=10, cached=False)[1] for place in self.places]
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with self.lock:
                if len(self.found) >= sum(ends):
                    return list(self.found)
            time.sleep(0.01)
        raise SystemExit(f"{len(self.found)} messages came of {ends}")


def main(brokers, partitions):
    lib = library()
    cluster = lib.rd_kafka_mock_cluster_new(lib.rd_kafka_new(0, lib.rd_kafka_conf_new(), None, 0), brokers)
    if lib.rd_kafka_mock_topic_create(cluster, b"audit", partitions, brokers) != 0:
        raise SystemExit("no topic")
    servers = lib.rd_kafka_mock_cluster_bootstraps(cluster).decode()
    reader = Reader(servers, partitions)
    print(servers, flush=True)
    for line in sys.stdin:
        match line.split():
            case ["down" | "up" as how]:
                for broker in range(1, brokers + 1):
                    getattr(lib, f"rd_kafka_mock_broker_set_{how}")(cluster, broker)
                print("done", flush=True)
            case ["leader", partition, broker]:
                lib.rd_kafka_mock_partition_set_leader(cluster, b"audit", int(partition), int(broker))
                print("done", flush=True)
            case ["error", code]:
                lib.rd_kafka_mock_push_request_errors_array(cluster, PRODUCE, 1, (INT * 1)(int(code)))
                print("done", flush=True)
            case ["read"]:
                print(json.dumps(reader.all()), flush=True)


main(int(sys.argv[1]), int(sys.argv[2]))
