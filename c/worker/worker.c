#define _GNU_SOURCE
#include "worker.h"

#include <sys/epoll.h>
#include <unistd.h>

#include "xdp/lending.h"

enum {
	/* A busy worker looks at its sleeping sources this often: a fifth of what waking a sleeper costs. */
	EVENTS_EVERY_US = 20,
	/* A system call is worth so many frames; for more to come they wait at most so many turns that bring something. */
	KICK_FRAMES = XN_BURST,
	KICK_TURNS = 8,
	/* More than this, both ways together and over so long, is a stream; less, a conversation. 128 Mb/s. */
	STREAM_BYTES_PER_US = 16,
	WEIGH_US = 1000,
	/* A guest that streams is told of what is sent when so much of its ring waits for that: it may have nothing left. */
	SENT_CALL_PART = 4,
	/* In a conversation whose frames come in less than so many spin times the worker polls from one to the next. */
	SPIN_STRETCH = 16,
	/* Longest sleep, busy or not: a lost kick, an interface that was down or a wedged queue is looked at after this. */
	SLEEP_MS = 100,
	/* Sleep with frames that the kernel did not take: a full queue below empties in about this time. */
	RETRY_MS = 1,
	/* So far below zero a port's interrupts wait, too: no work that a frame can bring costs as much. */
	CALL_DEBT_US = 1000,
	/* What a frame costs the kernel, at most: it may have lost the processor meanwhile. */
	MOST_KICK_NS = 5000,
	EVENTS = 64
};

/* ---- sources ---- */

static u64 moved_bytes(const struct source *s)
{
	return counted(s->bytes[0]) + counted(s->bytes[1]);
}

/* Edge-triggered: nobody reads the eventfd, so a kick costs the worker no system call. */
static int watch(struct worker *w, struct source *s)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = s};

	if (!epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, s->fd, &event))
		return 0;
	/* It could not be taken out when it was to be: then it is looked at anew. */
	return errno == EEXIST && !epoll_ctl(w->epoll_fd, EPOLL_CTL_MOD, s->fd, &event) ? 0 : -errno;
}

static void unwatch(struct worker *w, const struct source *s)
{
	(void)epoll_ctl(w->epoll_fd, EPOLL_CTL_DEL, s->fd, NULL);
}

static void activate(struct worker *w, struct source *s)
{
	if (s->active)
		return;
	s->active = true;
	s->last_work = cycles();
	w->active[w->active_n++] = s;
	if (s->unwatched)
		unwatch(w, s);
	if (s->ops->disarm)
		s->ops->disarm(s);
}

void worker_keep_active(struct worker *w, struct source *s)
{
	if (s->worker != w)
		return;
	activate(w, s);
	s->last_work = w->turn;
}

int worker_add_source(struct worker *w, struct source *s, u32 port)
{
	int r = w->sources_n == WORKER_SOURCES ? -ENOSPC : s->fd >= 0 ? watch(w, s) : 0;

	if (r)
		return r;
	s->worker = w;
	s->account = &w->accounts[port];
	s->place = place_of(port, s->queue);
	s->spin = w->all->spin_cycles;
	s->weighed = cycles();
	s->weighed_bytes = s->spins ? moved_bytes(s) : 0;
	s->slot = w->sources_n;
	w->sources[w->sources_n++] = s;
	if (!s->dead)
		activate(w, s);
	return 0;
}

void worker_remove_source(struct source *s)
{
	struct worker *w = s->worker;

	if (s->fd >= 0)
		unwatch(w, s);
	for (u32 i = 0; i < w->active_n; i++)
		if (w->active[i] == s) {
			w->active[i] = w->active[--w->active_n];
			break;
		}
	w->sources[s->slot] = w->sources[--w->sources_n];
	w->sources[s->slot]->slot = s->slot;
	s->worker = NULL;
}

static void forget_ring(struct worker *w, const struct virtqueue *q)
{
	u32 kept = 0;

	for (u32 i = 0; i < w->notify_n; i++)
		if (w->notify[i].ring != q)
			w->notify[kept++] = w->notify[i];
	w->notify_n = kept;
	kept = 0;
	for (u32 i = 0; i < w->lenders_n; i++)
		if (w->lenders[i] != q)
			w->lenders[kept++] = w->lenders[i];
	w->lenders_n = kept;
}

void workers_forget_ring(struct workers *all, const struct virtqueue *q)
{
	for (u32 i = 0; i < all->n; i++)
		forget_ring(all->each[i], q);
}

static void forget_xsk(struct worker *w, const struct xsk *x)
{
	u32 kept = 0;

	for (u32 i = 0; i < w->kick_n; i++)
		if (w->kick[i] != x)
			w->kick[kept++] = w->kick[i];
	w->kick_n = kept;
}

void workers_forget_xsk(struct workers *all, const struct xsk *x)
{
	for (u32 i = 0; i < all->n; i++)
		forget_xsk(all->each[i], x);
}

/* ---- a turn ---- */

/* What the source carries, of one that has just brought something. */
static void weigh(const struct worker *w, struct source *s)
{
	u64 cycles_per_us = w->cycles_per_us, over = w->turn - s->weighed;

	if (!s->spins || over < WEIGH_US * cycles_per_us)
		return;
	u64 bytes = moved_bytes(s);

	s->streams = (bytes - s->weighed_bytes) * cycles_per_us > over * STREAM_BYTES_PER_US;
	s->weighed = w->turn;
	s->weighed_bytes = bytes;
}

/*
 * A source was woken. If it had slept only shortly, polling on would have been cheaper, and the answer sooner: so it is
 * polled for longer from now on. Each long sleep halves that: one pause is not the end of a conversation.
 */
static void learn_spin(struct worker *w, struct source *s, u64 now)
{
	u64 spin = w->all->spin_cycles, longest = SPIN_STRETCH * spin;

	if (now - s->last_work < longest)
		s->spin = longest;
	else if (s->spin > spin)
		s->spin /= 2;
}

/* Whether a source that brought nothing is to be polled on. */
static bool is_worth_polling(const struct worker *w, const struct source *s, u64 now)
{
	u64 idle = now - s->last_work;

	return s->spins && (idle < w->all->spin_cycles || (idle < s->spin && !s->streams));
}

/* Polls the source for its port, and has that pay for it. */
static u32 poll_source(struct worker *w, struct source *s)
{
	w->payer = s->account;
	w->price = 0;
	worker_is_at(w, s->place);
	u32 n = s->ops->poll(w, s);
	u64 now = cycles(), took = now - w->clock, price = w->price * w->cycles_per_us / 1000;
	u64 most = price + MOST_POLL_US * w->cycles_per_us;

	/* While time is held, what it would have taken. */
	account_charge(s->account, clock_is_held() ? price : took < most ? took : most, w->quantum);
	w->clock = now;
	return n;
}

/* Polls every active source once whose port has credit; the number of frames moved. *most: of those that have none. */
static u32 poll_those_with_credit(struct worker *w, u64 now, s64 *most)
{
	u32 moved = 0;

	for (u32 i = 0; i < w->active_n;) {
		struct source *s = w->active[i];
		s64 credit = account_at(s->account, w->round, w->quantum)->credit;

		if (unlikely(credit <= 0)) {
			*most = credit > *most ? credit : *most;
			i++;
			continue;
		}
		u32 n = poll_source(w, s);

		moved += n;
		if (n) {
			if (s->account != w->mover) {
				w->mover = s->account;
				w->mover_since = now;
			}
			s->last_work = now;
			weigh(w, s);
			i++;
			continue;
		}
		/* Without an fd to wake it, it stays. */
		if ((s->fd < 0 && !s->dead) || is_worth_polling(w, s, now) || (s->ops->arm && s->ops->arm(s)) ||
		    (s->unwatched && watch(w, s) < 0)) {
			i++;
			continue;
		}
		s->active = false;
		w->active[i] = w->active[--w->active_n];
	}
	return moved;
}

/* Whether more than one port has had something to do lately. */
static bool is_contended(const struct worker *w)
{
	return w->turn - w->mover_since < CONTENDED_US * w->cycles_per_us;
}

/* A round for each quantum of time that has gone by. */
static void pay_by_time(struct worker *w)
{
	u64 rounds = (w->turn - w->paid) / (u64)w->quantum;

	/* Since long ago: it begins now. */
	if (rounds > DEBT_US / QUANTUM_US)
		rounds = 0, w->paid = w->turn;
	w->round += rounds;
	w->paid += rounds * (u64)w->quantum;
}

static u32 poll_sources(struct worker *w, u64 now)
{
	for (bool again = true;; again = false) {
		s64 most = INT64_MIN;
		u32 moved = poll_those_with_credit(w, now, &most);

		if (moved || most == INT64_MIN || !again)
			return moved;
		/* Whoever may go on has nothing to do: so many rounds later the next one may, or has nothing either. */
		if (likely(most > -w->quantum * (DEEP_DEBT_US / QUANTUM_US) || !is_contended(w)))
			w->round += 1 + (u64)(-most / w->quantum);
		else
			pay_by_time(w);
	}
}

/* What a frame costs the kernel, slowly following what it did. */
static void learn_kick(struct worker *w, u32 frames)
{
	u64 now = cycles(), most = MOST_KICK_NS * w->cycles_per_us / 1000;

	if (frames) {
		u64 each = (now - w->clock) / frames;

		w->kick_cycles += ((s64)(each < most ? each : most) - (s64)w->kick_cycles) / 16;
	}
	w->clock = now;
}

/* Kicks the sockets that were given frames; keeps those that did not take them all. How long to wait for those, in ms. */
static int kick_sockets(struct worker *w)
{
	int wait = SLEEP_MS;
	u32 kept = 0, frames = w->kick_frames;

	w->kick_frames = w->kick_turns = 0;
	for (u32 i = 0; i < w->kick_n; i++) {
		struct xsk *x = w->kick[i];

		worker_is_at(w, x->source.place);
		xsk_send(x);
		if (x->state == XSK_IDLE || x->state == XSK_GONE)
			continue;
		w->kick[kept++] = x;
		/* One that is down comes back in seconds, if at all. */
		if (x->state == XSK_OWING)
			wait = RETRY_MS;
	}
	w->kick_n = kept;
	learn_kick(w, frames);
	return wait;
}

/* Hands back chains whose loans have ended; keeps the rings that wait on. */
static void end_loans(struct worker *w, u64 now)
{
	u32 kept = 0;

	for (u32 i = 0; i < w->lenders_n; i++) {
		struct virtqueue *q = w->lenders[i];

		w->payer = q->source.account;
		worker_is_at(w, q->source.place);
		if (lending_take_back(q, now)) {
			worker_owes(w, q);
			w->lenders_wait = 1;
		}
		q->waits = q->loans_head != q->loans_tail;
		if (q->waits)
			w->lenders[kept++] = q;
	}
	w->lenders_n = kept;
}

/* Whether the guest is to be told now of all that it has back; before the worker sleeps, in any case. */
static struct account *account_of(struct worker *w, const struct virtqueue *q)
{
	return account_at(&w->accounts[port_of(q->source.place)], w->round, w->quantum);
}

static bool tells_all(const struct worker *w, const struct virtqueue *q)
{
	return !w->active_n || q->index % 2 == XN_RX || q->unchecked >= q->num / SENT_CALL_PART;
}

static bool call_is_due(const struct worker *w, const struct virtqueue *q)
{
	return tells_all(w, q) || (int64_t)(w->turn - q->call_due) >= 0;
}

/* Interrupts it, if it wants that; whether it is owed more. */
static bool notify(struct worker *w, struct virtqueue *q, struct account *payer)
{
	const u64 fair = CALL_US * w->cycles_per_us, calls = q->stats.calls;

	worker_is_at(w, q->source.place);
	vring_lock(q);
	/* What it has seen by itself meanwhile has cost nothing; what came later has a time of its own. */
	bool more = vring_notify(q, tells_all(w, q) ? q->used : q->owed, &w->caller);

	if (more)
		worker_set_due(w, q);
	else
		q->dirty &= ~(1u << w->id);
	vring_unlock(q);
	if (q->stats.calls != calls) {
		/* Alone, so that what it took is known. */
		caller_flush(&w->caller);
		u64 now = cycles(), took = now - w->clock;

		/* Whoever watches a guest's eventfd makes its interrupts slow; once, it may have been another's doing. */
		account_charge(payer, took < fair ? took : fair, w->quantum);
		if (unlikely(took > fair && q->slow_call))
			account_charge(account_of(w, q), took - fair, w->quantum);
		q->slow_call = took > fair;
		w->clock = now;
	}
	return more;
}

/*
 * Makes the interrupts that are due, in one turn no more than a quantum's worth: waking many is no less work than serving
 * them. How long the worker may sleep for what is left, in ms.
 */
static int notify_guests(struct worker *w)
{
	const s64 lowest = -(CALL_DEBT_US / QUANTUM_US) * w->quantum;
	const u64 start = w->clock;
	int wait = SLEEP_MS;
	bool due = false;
	u32 kept = 0;

	for (u32 i = 0; i < w->notify_n && !due; i++)
		due = call_is_due(w, w->notify[i].ring);
	if (!due)
		return wait;
	/* The used indices of the whole turn are visible before any of the guests' event indices is read. */
	full_fence();
	for (u32 i = 0; i < w->notify_n; i++) {
		struct virtqueue *q = w->notify[i].ring;
		bool overdrawn = account_of(w, q)->credit < lowest;
		bool late = w->clock - start > (u64)w->quantum;

		if (overdrawn && wait)
			wait = RETRY_MS;
		if (late)
			wait = 0;
		if (overdrawn || late || !call_is_due(w, q) || notify(w, q, w->notify[i].payer))
			w->notify[kept++] = w->notify[i];
	}
	w->notify_n = kept;
	return wait;
}

void worker_wake(struct worker *w)
{
	static const u64 one = 1;

	if (write(w->wake_fd, &one, sizeof(one)) < 0)
		return;
}

void worker_ask(struct worker *w, struct source *s)
{
	if (s->worker == w) {
		activate(w, s);
		return;
	}
	__atomic_store_n(&s->asked, true, __ATOMIC_RELAXED);
	/* Release: whoever sees that something is asked sees what. */
	__atomic_store_n(&s->worker->asked, true, __ATOMIC_RELEASE);
	worker_wake(s->worker);
}

static void activate_asked(struct worker *w)
{
	if (!__atomic_exchange_n(&w->asked, false, __ATOMIC_ACQUIRE))
		return;
	for (u32 i = 0; i < w->sources_n; i++)
		if (__atomic_exchange_n(&w->sources[i]->asked, false, __ATOMIC_RELAXED))
			activate(w, w->sources[i]);
}

/* Sources that sleep are polled without their asking: nothing may stay stuck on a kick that never came. */
static void look_at_all(struct worker *w)
{
	w->looked = cycles();
	for (u32 i = 0; i < w->sources_n; i++) {
		struct source *s = w->sources[i];

		if (s->active || s->dead)
			continue;
		/* Once, if it brings nothing: what it was like before stays. */
		u64 before = s->last_work;

		activate(w, s);
		s->last_work = before;
	}
}

void worker_wait(struct worker *w, int timeout_ms)
{
	struct epoll_event events[EVENTS];
	u64 until = timeout_ms ? monotonic_ns() + (u64)timeout_ms * 1000000 : 0, ns;
	int n;

	if (timeout_ms)
		worker_is_at(w, XN_AT_REST);
	/* What is over is said by the core's own clock, which may be held. */
	do {
		n = epoll_wait(w->epoll_fd, events, EVENTS, timeout_ms);
		ns = monotonic_ns();
	} while (!n && ns < until);
	w->now = (u32)(ns / 1000000000u);
	if (timeout_ms)
		count(&w->stats.sleeps, 1);
	for (int i = 0; i < n; i++) {
		struct source *s = events[i].data.ptr;
		u64 ignored;

		if (!s) {
			/* Only to be level again; what it asks for is in parking.wanted, or comes next. */
			if (read(w->wake_fd, &ignored, sizeof(ignored)) > 0)
				activate_asked(w);
			continue;
		}
		if (s->kicks)
			count(s->kicks, 1);
		s->woken = true;
		worker_is_at(w, s->place);
		if (!s->active)
			learn_spin(w, s, cycles());
		activate(w, s);
	}
	/* As often while others keep the worker busy. */
	if ((timeout_ms == SLEEP_MS && ns >= until) || cycles() - w->looked >= SLEEP_MS * 1000 * w->cycles_per_us)
		look_at_all(w);
}

static void park(struct worker *w)
{
	struct parking *p = &w->all->parking;

	worker_is_at(w, XN_PARKED);
	pthread_mutex_lock(&p->mutex);
	while (p->wanted) {
		p->parked++;
		pthread_cond_broadcast(&p->changed);
		pthread_cond_wait(&p->changed, &p->mutex);
		p->parked--;
	}
	pthread_mutex_unlock(&p->mutex);
	worker_is_at(w, XN_AT_REST);
}

/* The kernel does not tell when a loan ends: it is looked at, seldomer as time goes by. */
static int sleep_ms(struct worker *w, int most)
{
	if (!w->lenders_n || !most)
		return most;
	u32 wait = min_u32(w->lenders_wait, (u32)most);

	w->lenders_wait = 2 * wait;
	return (int)wait;
}

int worker_turn(struct worker *w)
{
	u64 now = w->turn = w->clock = cycles();
	u32 moved = poll_sources(w, now);

	int wait = SLEEP_MS, left;

	if (w->kick_n && (!moved || w->kick_frames >= KICK_FRAMES || ++w->kick_turns >= KICK_TURNS))
		wait = kick_sockets(w);
	if (unlikely(w->lenders_n))
		end_loans(w, now);
	left = notify_guests(w);
	count(&w->stats.loops, 1);
	if (moved)
		count(&w->stats.busy_cycles, cycles() - now);
	return wait < left ? wait : left;
}

void *worker_run(void *argument)
{
	struct worker *w = argument;
	const struct workers *all = w->all;
	u64 events_every = EVENTS_EVERY_US * w->cycles_per_us, last_events = 0;

	w->stats.tid = gettid();
	w->now = monotonic_s();
	while (__atomic_load_n(&all->running, __ATOMIC_ACQUIRE)) {
		int wait = worker_turn(w);

		if (unlikely(__atomic_load_n(&all->parking.wanted, __ATOMIC_ACQUIRE))) {
			park(w);
			continue;
		}
		if (!w->active_n) {
			worker_wait(w, sleep_ms(w, wait));
			last_events = cycles();
			/* Nobody wanted the time that it slept. */
			w->round += (last_events - w->turn) / (u64)w->quantum;
		} else if (w->turn - last_events > events_every || clock_is_held()) {
			worker_wait(w, 0);
			last_events = w->turn;
		}
	}
	worker_is_at(w, XN_AT_REST);
	return NULL;
}
