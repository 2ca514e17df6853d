// What Python cannot do about its own process: answer SIGSYS, and give up capabilities in every thread.
//
// A system call that the filter (system_call_filter.py) refuses arrives here as SIGSYS in the thread that made it.
// The handler counts it, writes one line for the first of each call, and has the call return EPERM.  Everything in
// it is async-signal-safe: it may run inside malloc, with or without Python's lock.
//
// Capabilities belong to threads (capabilities(7)).  So each thread is sent a signal, and gives up its own.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define CALLS 512
#define NAME 32
#define THREADS 1024
#define WAIT_MS 2000

static char names[CALLS][NAME];
static atomic_uint refused[CALLS];

static size_t put(char *to, size_t at, const char *text) {
    while (*text)
        to[at++] = *text++;
    return at;
}

static void on_refused(int number, siginfo_t *info, void *context) {
    int saved = errno;
    (void)number;
    if (info->si_code == 1 /* SYS_SECCOMP */) {
        unsigned call = (unsigned)info->si_syscall < CALLS ? (unsigned)info->si_syscall : CALLS - 1;
        ucontext_t *at = context;
#if defined(__x86_64__)
        at->uc_mcontext.gregs[REG_RAX] = -EPERM;
#elif defined(__aarch64__)
        at->uc_mcontext.regs[0] = (unsigned long long)-EPERM;
#else
#error "tell where this machine's system calls return"
#endif
        if (!atomic_fetch_add(&refused[call], 1)) {
            char line[160], digits[8];
            size_t n = put(line, 0, "Error: the system call filter refuses "), d = 0;
            n = put(line, n, names[call][0] ? names[call] : "a call");
            n = put(line, n, ", number ");
            for (unsigned left = call; d == 0 || left; left /= 10)
                digits[d++] = (char)('0' + left % 10);
            while (d)
                line[n++] = digits[--d];
            n = put(line, n, " (signals.syscall_filter)\n");
            ssize_t ignored = write(STDERR_FILENO, line, n);
            (void)ignored;
        }
    }
    errno = saved;
}

// Gives `call` the name that a refusal is told with.
void stella_confine_name(uint32_t call, const char *name) {
    if (call < CALLS) {
        strncpy(names[call], name, NAME - 1);
    }
}

// Answers SIGSYS from now on.  Returns 0 or -errno.
int stella_confine_answer(void) {
    struct sigaction action = {.sa_sigaction = on_refused, .sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER};
    return sigaction(SIGSYS, &action, NULL) ? -errno : 0;
}

// How often `call` was refused.
uint32_t stella_confine_refused(uint32_t call) {
    return call < CALLS ? atomic_load(&refused[call]) : 0;
}

static uint64_t keep_mask;
static atomic_int given_up, failed;

static int give_up(void) {
    for (int c = 0; c < 64; c++)
        if (!(keep_mask >> c & 1))
            prctl(PR_CAPBSET_DROP, c, 0, 0, 0);  // needs CAP_SETPCAP; without it there is no way to gain any either
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct have[2];
    if (syscall(SYS_capget, &header, have))
        return -errno;
    for (int word = 0; word < 2; word++) {
        uint32_t keep = (uint32_t)(keep_mask >> (32 * word));
        have[word].permitted &= keep;
        have[word].effective &= keep;
        have[word].inheritable = 0;
    }
    return syscall(SYS_capset, &header, have) ? -errno : 0;
}

static void on_give_up(int number) {
    int saved = errno;
    (void)number;
    int error = give_up();
    if (error)
        atomic_store(&failed, error);
    atomic_fetch_add(&given_up, 1);
    errno = saved;
}

// Leaves every thread of this process no capability that `keep` has no bit for.  Returns 0 or -errno; one caller at
// a time.
int stella_confine_keep(uint64_t keep) {
    int number = SIGRTMAX - 1, told = 0, error;
    pid_t done[THREADS];
    struct sigaction action = {.sa_handler = on_give_up, .sa_flags = SA_RESTART}, former;
    keep_mask = keep;
    atomic_store(&given_up, 0);
    atomic_store(&failed, 0);
    pid_t self = (pid_t)syscall(SYS_gettid);
    if (sigaction(number, &action, &former))
        return -errno;
    // This thread first: threads that it starts have no more than it has.  Then all, until no new one shows.
    error = give_up();
    for (int fresh = 1; fresh && !error;) {
        DIR *tasks = opendir("/proc/self/task");
        if (!tasks) {
            error = -errno;
            break;
        }
        fresh = 0;
        for (struct dirent *entry; !error && (entry = readdir(tasks));) {
            pid_t task = (pid_t)atoi(entry->d_name);
            int known = task <= 0 || task == self;
            for (int i = 0; i < told && !known; i++)
                known = done[i] == task;
            if (known)
                continue;
            if (told == THREADS) {
                error = -E2BIG;
                break;
            }
            fresh = 1;
            done[told] = task;
            if (syscall(SYS_tgkill, getpid(), task, number) == 0)
                told++;
        }
        closedir(tasks);
        for (int ms = 0; atomic_load(&given_up) < told && !error; ms++) {
            struct timespec pause = {0, 1000000};
            nanosleep(&pause, NULL);
            if (ms > WAIT_MS)
                error = -ETIMEDOUT;
        }
    }
    sigaction(number, &former, NULL);
    return error ? error : atomic_load(&failed);
}
