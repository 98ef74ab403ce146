/*
 * UDP as a guest's programs send and receive it: large sends that the kernel or the card cuts (UDP_SEGMENT), and receives
 * that are told of frames in one piece (UDP_GRO). udp(7).
 *
 *   datagrams send ADDRESS PORT SEGMENT TOTAL...   each TOTAL bytes in one send; 0 for SEGMENT: not to be cut
 *   datagrams receive PORT SECONDS COUNT FILE      until COUNT bytes have come: a line for each receive, "LENGTH SEGMENT
 *                                                  ADLER32"; returns once it is bound, and goes on in the background
 *
 * Byte i of a send is i * 31 + (i >> 8) + its number.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { UDP_SEGMENT = 103, UDP_GRO = 104, MOST = 65536 };

static uint8_t bytes[MOST];

static void check(int result, const char *what)
{
	if (result >= 0)
		return;
	perror(what);
	exit(1);
}

static int udp(int option, int value)
{
	int fd = socket(AF_INET6, SOCK_DGRAM, IPPROTO_UDP), off = 0, room = 1 << 22;

	check(fd, "socket");
	check(setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)), "IPV6_V6ONLY");
	check(setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)), "SO_RCVBUFFORCE");
	check(setsockopt(fd, IPPROTO_UDP, option, &value, sizeof(value)), "a UDP option");
	return fd;
}

static void send_all(char **args)
{
	struct sockaddr_in6 to = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)atoi(args[1]))};
	int fd = udp(UDP_SEGMENT, atoi(args[2]));

	check(inet_pton(AF_INET6, args[0], &to.sin6_addr) - 1, "address");
	for (int number = 0; args[3 + number]; number++) {
		int total = atoi(args[3 + number]);

		for (int i = 0; i < total; i++)
			bytes[i] = (uint8_t)(i * 31 + (i >> 8) + number);
		check((int)sendto(fd, bytes, (size_t)total, 0, (struct sockaddr *)&to, sizeof(to)), "sendto");
	}
}

static uint32_t adler32(const uint8_t *p, int n)
{
	uint32_t a = 1, b = 0;

	for (int i = 0; i < n; i++) {
		a = (a + p[i]) % 65521;
		b = (b + a) % 65521;
	}
	return b << 16 | a;
}

/* Its length; the segments' in *segment, 0 where it is not of several. */
static int receive_one(int fd, int *segment)
{
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = {bytes, sizeof(bytes)};
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	int n = (int)recvmsg(fd, &msg, 0);
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	check(n, "recvmsg");
	*segment = 0;
	if (c && c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO)
		memcpy(segment, CMSG_DATA(c), sizeof(*segment));
	return n;
}

static void receive_all(char **args)
{
	struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)atoi(args[0]))};
	int fd = udp(UDP_GRO, 1), left = atoi(args[2]), segment, n;
	time_t end = time(NULL) + atoi(args[1]);
	FILE *out = fopen(args[3], "w");

	check(out ? 0 : -1, args[3]);
	check(bind(fd, (struct sockaddr *)&here, sizeof(here)), "bind");
	if (fork())
		return;
	for (; left > 0; left -= n) {
		struct pollfd p = {fd, POLLIN, 0};

		int patience = end > time(NULL) ? (int)(end - time(NULL)) * 1000 : 0;

		if (poll(&p, 1, patience) <= 0)
			break;
		n = receive_one(fd, &segment);
		fprintf(out, "%d %d %u\n", n, segment, adler32(bytes, n));
	}
	fprintf(out, "end\n");
	fclose(out);
}

int main(int argc, char **argv)
{
	if (argc > 5 && !strcmp(argv[1], "send"))
		send_all(argv + 2);
	else if (argc == 6 && !strcmp(argv[1], "receive"))
		receive_all(argv + 2);
	else
		return 2;
	return 0;
}
