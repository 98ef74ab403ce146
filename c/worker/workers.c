/* The workers of a bridge, all of them: they are made, run, stand still for the control thread, and end. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "worker.h"

enum {
	/*
	 * So long a guest that streams is not told that its frames are sent, if nothing else needs telling: drivers look at
	 * both rings when a frame arrives, and one is often on its way. In a conversation it is told at once: its processor
	 * has nothing to do and halts, and it would be the answer that has to wake it.
	 */
	SENT_CALL_US = 200,
	/* What a frame costs the kernel, until that has been seen. */
	KICK_NS = 500,
	ROUND_STEP_US = 20
};

/* What runs over one array is found before it is in the next. */
static void poison_gaps(struct worker *w)
{
	u8 *const gaps[] = {w->gap_sources,   w->gap_active, w->gap_notify,    w->gap_kick,
			    w->gap_lenders,   w->gap_views,  w->gap_pieces,    w->gap_joined,
			    w->gap_to_pieces, w->gap_chains, w->cut.gap_views, w->cut.gap_pieces};

	for (u32 i = 0; i < ARRAY_LEN(gaps); i++)
		ASAN_POISON_MEMORY_REGION(gaps[i], XN_GAP);
	for (u32 i = 0; i < XN_BURST; i++) {
		ASAN_POISON_MEMORY_REGION(w->headers[i] + PACKET_HEADERS, XN_GAP);
		ASAN_POISON_MEMORY_REGION(w->cut.headers[i] + sizeof(w->cut.headers[i]) - XN_GAP, XN_GAP);
	}
}

static void free_worker(struct worker *w)
{
	if (!w)
		return;
	if (w->epoll_fd >= 0)
		close(w->epoll_fd);
	if (w->wake_fd >= 0)
		close(w->wake_fd);
	caller_release(&w->caller);
	free(w->group_frames);
	free(w);
}

/* NULL: errno says why. */
static struct worker *new_worker(struct workers *all, u32 id, s32 cpu)
{
	struct worker *w = aligned_alloc(XN_CACHELINE, (sizeof(*w) + XN_CACHELINE - 1) / XN_CACHELINE * XN_CACHELINE);
	struct epoll_event event = {.events = EPOLLIN};

	if (!w)
		return NULL;
	memset(w, 0, sizeof(*w));
	poison_gaps(w);
	w->all = all;
	w->id = id;
	w->cycles_per_us = clock_cycles_per_us();
	w->stats.cpu = cpu;
	w->stats.at = w->stats.to = XN_AT_REST;
	w->quantum = (s64)(QUANTUM_US * w->cycles_per_us);
	w->kick_cycles = KICK_NS * w->cycles_per_us / 1000;
	w->sent_call_delay = SENT_CALL_US * w->cycles_per_us;
	int r = caller_init(&w->caller);

	w->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	w->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (!r && (w->epoll_fd < 0 || w->wake_fd < 0 || epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, w->wake_fd, &event) < 0))
		r = -errno;
	if (r) {
		free_worker(w);
		errno = -r;
		return NULL;
	}
	return w;
}

static int start(struct worker *w)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int r;

	pthread_attr_init(&attributes);
	if (w->stats.cpu >= 0) {
		cpu_set_t cpus;

		CPU_ZERO(&cpus);
		CPU_SET(w->stats.cpu, &cpus);
		pthread_attr_setaffinity_np(&attributes, sizeof(cpus), &cpus);
	}
	/* Signals are the control thread's, but for what a thread raises itself: blocked, a fault kills at once. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGILL);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	r = pthread_create(&w->thread, &attributes, worker_run, w);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return -r;
}

static void join(struct worker *w)
{
	worker_wake(w);
	pthread_join(w->thread, NULL);
}

void workers_set_spin(struct workers *all, u32 us)
{
	all->spin_cycles = us * clock_cycles_per_us();
}

int workers_init(struct workers *all, const struct xn_bridge_config *config)
{
	pthread_mutex_init(&all->parking.mutex, NULL);
	pthread_cond_init(&all->parking.changed, NULL);
	workers_set_spin(all, config->spin_us);
	while (all->n < config->workers) {
		struct worker *w = new_worker(all, all->n, config->cpus[all->n]);

		if (!w)
			return -errno;
		all->each[all->n++] = w;
	}
	return 0;
}

void workers_release(struct workers *all)
{
	for (u32 i = 0; i < all->n; i++)
		free_worker(all->each[i]);
	pthread_cond_destroy(&all->parking.changed);
	pthread_mutex_destroy(&all->parking.mutex);
}

int workers_start(struct workers *all)
{
	if (all->running)
		return -EALREADY;
	all->running = true;
	for (u32 i = 0; i < all->n; i++) {
		int r = start(all->each[i]);

		if (r < 0) {
			__atomic_store_n(&all->running, false, __ATOMIC_RELEASE);
			for (u32 done = 0; done < i; done++)
				join(all->each[done]);
			return r;
		}
	}
	return 0;
}

void workers_stop(struct workers *all)
{
	if (!all->running)
		return;
	__atomic_store_n(&all->running, false, __ATOMIC_RELEASE);
	for (u32 i = 0; i < all->n; i++)
		join(all->each[i]);
}

/* Three turns: one may have begun before, its worker may only then look at its events, and the last is a whole one. */
void workers_go_round(struct workers *all)
{
	u64 loops[XN_MAX_WORKERS];

	for (u32 turns = 0; all->running && turns < 3; turns++) {
		for (u32 i = 0; i < all->n; i++) {
			loops[i] = counted(&all->each[i]->stats.loops);
			worker_wake(all->each[i]);
		}
		for (u32 i = 0; i < all->n; i++)
			while (counted(&all->each[i]->stats.loops) == loops[i])
				usleep(ROUND_STEP_US);
	}
}

void workers_park(struct workers *all)
{
	struct parking *p = &all->parking;

	pthread_mutex_lock(&p->mutex);
	if (p->wanted)
		abort(); /* a fault of ours: to go on would be to change what workers use */
	p->since = monotonic_ns();
	__atomic_store_n(&p->wanted, true, __ATOMIC_RELEASE);
	if (all->running) {
		for (u32 i = 0; i < all->n; i++)
			worker_wake(all->each[i]);
		while (p->parked < all->n)
			pthread_cond_wait(&p->changed, &p->mutex);
	}
	pthread_mutex_unlock(&p->mutex);
}

void workers_resume(struct workers *all)
{
	struct parking *p = &all->parking;

	pthread_mutex_lock(&p->mutex);
	p->total += monotonic_ns() - p->since;
	__atomic_store_n(&p->wanted, false, __ATOMIC_RELEASE);
	pthread_cond_broadcast(&p->changed);
	pthread_mutex_unlock(&p->mutex);
}
