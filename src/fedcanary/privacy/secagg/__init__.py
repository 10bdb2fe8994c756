"""Secure aggregation: the server learns the sum of the clients' integer vectors and no vector of its own.

Bonawitz et al. 2017 (CCS) with its consistency check, on a sparse graph in the manner of Bell et al. 2020 (CCS) above
64 clients. `Client` and `Server` are state machines without a transport; `aggregate` runs both in one process.
One step is one exchange:

    step       client method   message up    server method     message down
    advertise  advertise       Advert        roster            Roster: who takes part, the neighbours' signed keys
    share      share           Shares        deliveries        Delivery: sealed shares from the neighbours
    mask       mask            MaskedInput   survivor_list     Survivors: whose inputs are in the sum
    agree      agree           Agreement     agreements        Agreements: signatures over the survivors
    unmask     unmask          Unmasking     unmask            -- the sum

What client i sends of its vector x_i is, modulo 2^bits,
    y_i = x_i + PRG(b_i) + sum over neighbours j > i of PRG(s_ij) - sum over neighbours j < i of PRG(s_ij)
with s_ij from X25519 and HKDF-SHA256, fresh each round, and AES-256 in counter mode as PRG. Neighbours hold Shamir
shares of b_i and of the seed of i's masking key. What keeps x_i hidden from whoever runs the server:

    one kind      of j's two seeds a client ever gives one share: of b_j if j survived, of the key if it did not
    one list      and gives it only after a quorum has signed the same survivors as it did
    mutual masks  and of b_j only if j has shown that it masked with this client (`acks`), or a server could tell j
                  of no neighbours but those it is about to declare dropped
    no corners    a client with fewer than half of its neighbours left takes no further part, so that no small group
                  can be cut out of the graph and summed alone
    no inventions keys count only when signed by a key of the registration list

Where each message is another process's to answer, a client lives on as bytes (`Client.to_bytes`, `Client.from_bytes`);
the rule that goes with it is in `keep`.

Not covered: a client that lies about its vector, and who is on the registration list. Whether a message came from
the client it names is the transport's to know (`sender` of `Server.collect`).
"""

from fedcanary.privacy.secagg.client import Client
from fedcanary.privacy.secagg.integers import check_capacity, decode_signed, encode
from fedcanary.privacy.secagg.messages import decode
from fedcanary.privacy.secagg.server import Server
from fedcanary.privacy.secagg.simulate import Outcome, aggregate, register, run
from fedcanary.privacy.secagg.terms import Aborted, Refusal, Registry, Step, Terms

__all__ = [
    "Aborted",
    "Client",
    "Outcome",
    "Refusal",
    "Registry",
    "Server",
    "Step",
    "Terms",
    "aggregate",
    "check_capacity",
    "decode",
    "decode_signed",
    "encode",
    "register",
    "run",
]
