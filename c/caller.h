/*
 * A caller: signals eventfds, or UNIX stream sockets, that are somebody else's, and never waits for one.
 *
 * A write(2) waits as long as the counter is full, unless the descriptor has O_NONBLOCK; but that flag belongs to the open
 * file, which the frontend shares, and clears when it likes. So the kernel signals for us, as it does for a device: each
 * eventfd is the one that an asynchronous read, of nothing, tells of its end (IOCB_FLAG_RESFD). The read ends within
 * io_submit(2), and a full counter stays full (Linux fs/aio.c, eventfd_signal() in fs/eventfd.c). What else there is does
 * not do: such a file cannot be opened anew (ENXIO), and pwritev2 has no RWF_NOWAIT for it; io_uring is often switched off,
 * and its write of a descriptor that blocks takes a thread of the kernel's for as long.
 *
 * User-mode Linux has a socket instead, for an eventfd raises no SIGIO, and reads the same eight bytes from it. To send them
 * with MSG_DONTWAIT takes no lock that others may hold for long, on a stream socket of this family (others, a TCP socket's
 * say, may be held), and what finds no room needs none: there are calls to read. Only with 16,000 UNIX sockets on their way
 * in others has Linux before 6.9 a sender wait until it has counted them.
 *
 * Nanoseconds for each, nobody waiting and (then) watched by an epoll set of another CPU: write 122 (507), io_submit of
 * one 270 (491), of eight 185 (352), io_uring of one 235 (498). A thread that may block costs its wake-up, 20000 and more.
 */
#ifndef XN_CALLER_H
#define XN_CALLER_H

#include <linux/aio_abi.h>

#include "base.h"

enum { CALLER_BATCH = 32 };

struct caller {
	aio_context_t context; /* 0: none */
	int null_fd;	       /* what is read from */
	u32 n;		       /* calls that wait for the flush */
	struct iocb blocks[CALLER_BATCH];
	struct iocb *list[CALLER_BATCH];
};

/* 0; -ENOSYS: the kernel has none (CONFIG_AIO), or a filter forbids it; -EAGAIN: fs.aio-max-nr is used up; others of open(2). */
int caller_init(struct caller *c);
/* Of one that is all zeroes, too. */
void caller_release(struct caller *c);
/* The eventfd is signalled at the flush, or before; it has to stay open until then. */
void caller_add(struct caller *c, int fd);
void caller_flush(struct caller *c);

#endif
