/*
 * Moves bytes over TCP and datagrams over UDP, and compares what arrived with what was sent.
 *
 *   transfer serve PORT
 *   transfer with ADDRESS PORT BYTES DATAGRAMS SIZE[,SIZE...]
 *
 * A stream of BYTES to the server, and one from it; of both, either end says its checksum. Then datagrams of these sizes in
 * turn, each echoed and compared, until DATAGRAMS bytes went both ways together; none may be lost, for few are under way
 * at once. IPv4 and IPv6, by the address. Whatever takes PATIENCE_S without a byte has failed.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	BLOCK = (60 << 10) + 1, /* odd, so that the pieces of a sender's frames end at odd bytes */
	NOISE = 1 << 20,
	MAX_DATAGRAM = 65535,
	MAX_SIZES = 64,
	PATIENCE_S = 20,
	ECHO_PATIENCE_MS = 3000,
	/* Under way at once: what every ring and socket buffer on the way has room for, in frames of 1500 bytes too. */
	MOST_DATAGRAMS = 24,
	MOST_BYTES = 64 << 10,
	SOCKET_BUFFER = 4 << 20
};

struct request {
	uint64_t bytes; /* both in the byte order of this machine: both ends are on it */
	uint64_t down;
};

static uint8_t noise[NOISE + MAX_DATAGRAM + 1];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static void make_noise(void)
{
	uint64_t state = 1, word;

	for (size_t i = 0; i + sizeof(word) <= sizeof(noise); i += sizeof(word)) {
		word = next_random(&state);
		memcpy(noise + i, &word, sizeof(word));
	}
}

/* Where the noise of part `number` of a stream, or of datagram `number`, begins: at any alignment. */
static const uint8_t *noise_of(uint64_t number)
{
	return noise + next_random(&number) % NOISE;
}

static uint64_t checksum(uint64_t sum, const uint8_t *p, size_t n)
{
	uint64_t word;

	for (; n >= sizeof(word); n -= sizeof(word), p += sizeof(word)) {
		memcpy(&word, p, sizeof(word));
		sum = (sum ^ word) * 0x9e3779b97f4a7c15;
		sum ^= sum >> 29;
	}
	for (; n; n--, p++)
		sum = (sum ^ *p) * 0x100000001b3;
	return sum;
}

static void be_patient(int fd)
{
	const struct timeval patience = {.tv_sec = PATIENCE_S};
	const int buffer = SOCKET_BUFFER;

	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)))
		die("setsockopt");
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof(buffer)))
		die("SO_RCVBUFFORCE");
}

static int send_all(int fd, const uint8_t *p, size_t n)
{
	while (n) {
		ssize_t sent = send(fd, p, n, MSG_NOSIGNAL);

		if (sent < 0)
			return -1;
		p += sent;
		n -= (size_t)sent;
	}
	return 0;
}

static int receive_all(int fd, void *p, size_t n)
{
	ssize_t got = recv(fd, p, n, MSG_WAITALL);

	if (got >= 0 && (size_t)got != n)
		errno = got ? ETIMEDOUT : ECONNRESET;
	return (size_t)got == n ? 0 : -1;
}

/* In whole blocks mostly; one of eight in parts, so that there are frames of every kind of length. */
static int send_stream(int fd, uint64_t bytes, uint64_t *sum)
{
	static const size_t parts[] = {1, 1447, 1449, 17, 8947, 20001};

	for (uint64_t block = 0; bytes; block++) {
		size_t n = bytes < BLOCK ? bytes : BLOCK, at = 0;
		const uint8_t *p = noise_of(block);

		*sum = checksum(*sum, p, n);
		for (size_t i = 0; block % 8 == 0 && i < sizeof(parts) / sizeof(*parts) && at + parts[i] < n; i++) {
			if (send_all(fd, p + at, parts[i]))
				return -1;
			at += parts[i];
		}
		if (send_all(fd, p + at, n - at))
			return -1;
		bytes -= n;
	}
	return 0;
}

static int receive_stream(int fd, uint64_t bytes, uint64_t *sum)
{
	static uint8_t block[BLOCK];

	while (bytes) {
		size_t n = bytes < BLOCK ? bytes : BLOCK;

		if (receive_all(fd, block, n))
			return -1;
		*sum = checksum(*sum, block, n);
		bytes -= n;
	}
	return 0;
}

/* ---- the server ---- */

static void serve_stream(int listener)
{
	int fd = accept(listener, NULL, NULL), on = 1;
	struct request request;
	uint64_t sum = 0;

	if (fd < 0)
		return;
	be_patient(fd);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (receive_all(fd, &request, sizeof(request)) ||
	    (request.down ? send_stream : receive_stream)(fd, request.bytes, &sum) ||
	    send_all(fd, (const uint8_t *)&sum, sizeof(sum)))
		perror("stream");
	close(fd);
}

static void serve_datagram(int fd)
{
	static uint8_t datagram[MAX_DATAGRAM];
	struct sockaddr_in6 from;
	socklen_t length = sizeof(from);
	ssize_t n = recvfrom(fd, datagram, sizeof(datagram), 0, (struct sockaddr *)&from, &length);

	if (n >= 0 && sendto(fd, datagram, (size_t)n, 0, (struct sockaddr *)&from, length) < 0)
		perror("datagram");
}

static void serve(uint16_t port)
{
	const struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	struct pollfd fds[2] = {{.events = POLLIN}, {.events = POLLIN}};
	int off = 0, on = 1;

	for (int i = 0; i < 2; i++) {
		int fd = fds[i].fd = socket(AF_INET6, i ? SOCK_DGRAM : SOCK_STREAM, 0);

		if (fd < 0 || setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)) ||
		    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) ||
		    bind(fd, (const struct sockaddr *)&any, sizeof(any)))
			die("bind");
	}
	if (listen(fds[0].fd, 4))
		die("listen");
	be_patient(fds[1].fd);
	for (;;) {
		if (poll(fds, 2, -1) < 0)
			die("poll");
		if (fds[0].revents)
			serve_stream(fds[0].fd);
		if (fds[1].revents)
			serve_datagram(fds[1].fd);
	}
}

/* ---- the client ---- */

static int connected(int type, const char *address, uint16_t port)
{
	struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port)};
	int is_six = inet_pton(AF_INET6, address, &six.sin6_addr);
	int fd = socket(is_six ? AF_INET6 : AF_INET, type, 0);

	if (!is_six && !inet_pton(AF_INET, address, &four.sin_addr)) {
		fprintf(stderr, "%s: not an address\n", address);
		exit(1);
	}
	if (fd < 0)
		die("socket");
	be_patient(fd);
	if (connect(fd, is_six ? (struct sockaddr *)&six : (struct sockaddr *)&four,
		    is_six ? sizeof(six) : sizeof(four)))
		die("connect");
	return fd;
}

static void stream(const char *address, uint16_t port, uint64_t bytes, int down)
{
	const struct request request = {bytes, (uint64_t)down};
	int fd = connected(SOCK_STREAM, address, port), on = 1;
	uint64_t ours = 0, theirs;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (send_all(fd, (const uint8_t *)&request, sizeof(request)) ||
	    (down ? receive_stream : send_stream)(fd, bytes, &ours) || receive_all(fd, &theirs, sizeof(theirs)))
		die(down ? "stream from the server" : "stream to the server");
	close(fd);
	printf("%s: %llu bytes, %016llx here, %016llx there\n", down ? "down" : "up", (unsigned long long)bytes,
	       (unsigned long long)ours, (unsigned long long)theirs);
}

/* One of those that are under way comes back, as it was. `left`: their bits, from datagram `first` on. */
static void await_echo(int fd, uint64_t first, uint64_t *left, const size_t *sizes, size_t sizes_n)
{
	static uint8_t datagram[MAX_DATAGRAM + 1];
	struct pollfd ready = {.fd = fd, .events = POLLIN};

	if (poll(&ready, 1, ECHO_PATIENCE_MS) <= 0) {
		for (unsigned int i = 0; i < MOST_DATAGRAMS; i++)
			if (*left >> i & 1)
				fprintf(stderr, "datagram %llu of %zu bytes is lost\n", (unsigned long long)first + i,
					sizes[(first + i) % sizes_n]);
		exit(1);
	}
	ssize_t n = recv(fd, datagram, sizeof(datagram), 0);

	if (n < 0)
		die("recv");
	for (unsigned int i = 0; i < MOST_DATAGRAMS; i++) {
		if (!(*left >> i & 1) || sizes[(first + i) % sizes_n] != (size_t)n ||
		    memcmp(noise_of(first + i), datagram, (size_t)n) != 0)
			continue;
		*left &= ~(1ull << i);
		return;
	}
	fprintf(stderr, "a datagram of %zd bytes, near number %llu, is none that was sent\n", n,
		(unsigned long long)first);
	exit(1);
}

static void datagrams(const char *address, uint16_t port, uint64_t bytes, const size_t *sizes, size_t sizes_n)
{
	int fd = connected(SOCK_DGRAM, address, port);
	uint64_t done = 0, number = 0;

	while (done < bytes) {
		uint64_t left = 0, first = number;
		size_t under_way = 0;

		do {
			size_t n = sizes[number % sizes_n];

			if (send(fd, noise_of(number), n, 0) < 0)
				die("send");
			left |= 1ull << (number - first);
			number++;
			under_way += n;
		} while (number - first < MOST_DATAGRAMS && under_way + sizes[number % sizes_n] <= MOST_BYTES);
		done += 2 * under_way;
		while (left)
			await_echo(fd, first, &left, sizes, sizes_n);
	}
	close(fd);
	printf("echoed: %llu datagrams, %llu bytes both ways\n", (unsigned long long)number, (unsigned long long)done);
}

int main(int argc, char **argv)
{
	size_t sizes[MAX_SIZES], n = 0;

	make_noise();
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve((uint16_t)atoi(argv[2]));
	if (argc != 7 || strcmp(argv[1], "with") != 0) {
		fprintf(stderr, "usage: see the head of transfer.c\n");
		return 2;
	}
	const char *address = argv[2];
	uint16_t port = (uint16_t)atoi(argv[3]);

	for (char *word = strtok(argv[6], ","); word && n < MAX_SIZES; word = strtok(NULL, ","))
		sizes[n++] = strtoul(word, NULL, 10);
	stream(address, port, strtoull(argv[4], NULL, 10), 0);
	stream(address, port, strtoull(argv[4], NULL, 10), 1);
	datagrams(address, port, strtoull(argv[5], NULL, 10), sizes, n);
	return 0;
}
