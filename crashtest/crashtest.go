// Package crashtest runs something on a simulated device once for each place
// where the power can fail, and each way in which it can: with one fault, with
// all pairs, with all triples. What fails is reported as one line that replays it.
//
// It tests whatever is built on [ota.Flash]: a Bootloader, a boot stage, a whole
// device. A [Scenario] makes a [Device]: a simulated chip, what is done on it, and
// what must be true afterwards:
//
//	crashtest.Scenario{
//		Name: "nor-4k/store",
//		New: func(ctx context.Context) (*crashtest.Device, error) {
//			chip := base.Clone() // holds state a
//			return &crashtest.Device{
//				Chip:  chip,
//				Run:   func(ctx context.Context) error { return open(chip).Store(ctx, b) },
//				Check: func(ctx context.Context) error { return isAorB(open(chip).Load(ctx)) },
//			}, nil
//		},
//	}
//
// [Run] is for tests, [Explore] for everything else, [Scenario.Replay] repeats one
// run. The example of the package is complete.
package crashtest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slotota/ota/flash/memflash"
)

// ErrViolation marks the errors of Device.Run and Device.Check that no fault
// excuses: wrap it if what was promised is broken. Any other error counts only if
// no fault has struck meanwhile.
var ErrViolation = errors.New("broken promise")

// Scenario is something that faults shall interrupt.
type Scenario struct {
	// Name identifies the scenario among others, such as "nor-4k/update".
	Name string
	// New returns a device of its own for one run. It is called often and from
	// several goroutines: prepare a chip once and return clones of it. All
	// devices must be equal and behave in the same way, down to the last
	// operation on flash, or a run cannot be repeated.
	New func(ctx context.Context) (*Device, error)
}

// Device is a simulated device, ready for one run. Run and Check may keep common
// knowledge about what was promised; they are never called at the same time.
type Device struct {
	// Chip is where faults happen.
	Chip *memflash.Chip
	// Run does what the scenario is about. Once a fault has struck it may fail
	// in any way but with ErrViolation.
	Run func(ctx context.Context) error
	// Check is called when the power is back: it starts the device anew, as
	// after a reset, and returns an error if it does not find what it must.
	// Should another fault strike meanwhile, it is called once more.
	Check func(ctx context.Context) error
}

// Modes returns the ways in which an operation can go wrong, always as many. What
// they leave open follows from seed. [memflash.TearModes] is one.
type Modes func(seed uint64) []memflash.Fault

// Options say how far to go. The zero value means single power cuts.
type Options struct {
	// Faults has one entry for each fault of a run: with one entry every
	// operation of Run goes wrong once in each of its modes, with two all pairs
	// follow, then all triples. The first fault strikes in Run, the others
	// anywhere later in Run or Check. nil means []Modes{memflash.TearModes}.
	//
	// The field At of the faults is overwritten. Faults with On = OpRead strike
	// at reads, all others at operations; do not mix them in one fault. A fault
	// that is Forever ends with the next reset.
	Faults []Modes
	// Seeds is how many variants of each fault are tried, 0 means 1.
	Seeds int
	// Workers is how many runs are made at a time; 0 means GOMAXPROCS.
	Workers int
	// Timeout is how long a run may take; 0 means a minute. The context of a
	// run ends then. A run that goes on is left behind as a failure.
	Timeout time.Duration
	// Replay makes Run repeat a single run, by the text in a [Failure].
	Replay string
}

// Report says what was tried.
type Report struct {
	// Ops and Reads are the operations of Run without a fault.
	Ops, Reads int
	// Runs counts runs by the number of faults that struck; Runs[0] is 1.
	Runs []int
}

// Total returns the number of runs with at least one fault.
func (r Report) Total() int {
	n := 0
	for _, k := range r.Runs[min(1, len(r.Runs)):] {
		n += k
	}
	return n
}

// add adds the runs of s.
func (r *Report) add(s Report) {
	r.Ops += s.Ops
	r.Reads += s.Reads
	for i, n := range s.Runs {
		if i == len(r.Runs) {
			r.Runs = append(r.Runs, 0)
		}
		r.Runs[i] += n
	}
}

// String returns the figures on one line.
func (r Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d operations, %d reads", r.Ops, r.Reads)
	for i, n := range r.Runs {
		if i > 0 {
			fmt.Fprintf(&b, ", %d %s", n, [...]string{"singles", "pairs", "triples", "larger sets"}[min(i-1, 3)])
		}
	}
	return b.String()
}

// Failure is a run that went wrong.
type Failure struct {
	Scenario string
	Faults   []memflash.Fault // none: it fails without any
	Err      error
}

// Error begins with the text that replays the run.
func (f *Failure) Error() string {
	return fmt.Sprintf("crashtest: replay %q: %v", FormatReplay(f.Scenario, f.Faults), f.Err)
}

// Unwrap returns f.Err.
func (f *Failure) Unwrap() error { return f.Err }

// Explore runs s once for each combination of faults. A failure is returned as a
// [*Failure]: the one with the fewest faults and, among these, with the earliest.
// The error is that of ctx if it ends.
func Explore(ctx context.Context, s Scenario, o *Options) (Report, error) {
	e := explorer{s: s, faults: []Modes{memflash.TearModes}, seeds: 1, workers: runtime.GOMAXPROCS(0), timeout: time.Minute}
	if o != nil {
		if o.Faults != nil {
			e.faults = o.Faults
		}
		e.seeds = max(e.seeds, o.Seeds)
		if o.Workers > 0 {
			e.workers = o.Workers
		}
		if o.Timeout > 0 {
			e.timeout = o.Timeout
		}
	}
	r := Report{Runs: make([]int, 1+len(e.faults))}
	clean, err := e.once(ctx, nil)
	if err != nil {
		return r, e.failure(ctx, nil, err)
	}
	again, err := e.once(ctx, nil)
	if err == nil && again != clean {
		err = fmt.Errorf("runs without a fault differ: %+v and %+v", clean, again)
	}
	if err != nil {
		return r, e.failure(ctx, nil, err)
	}
	r.Ops, r.Reads, r.Runs[0] = clean.run.Ops, clean.run.Reads, 1
	for depth := 1; depth <= len(e.faults); depth++ {
		n, err := e.level(ctx, depth, clean)
		r.Runs[depth] = n
		if err != nil {
			return r, err
		}
	}
	return r, nil
}

// Replay makes one run of s and returns what is wrong with it, as a [*Failure].
// Faults are numbered from the first operation of Run.
func (s Scenario) Replay(ctx context.Context, faults ...memflash.Fault) error {
	e := explorer{s: s}
	_, err := e.once(ctx, faults)
	return e.failure(ctx, faults, err)
}

type explorer struct {
	s       Scenario
	faults  []Modes
	seeds   int
	workers int
	timeout time.Duration // 0: none
}

func (e *explorer) failure(ctx context.Context, faults []memflash.Fault, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return &Failure{Scenario: e.s.Name, Faults: slices.Clone(faults), Err: err}
}

// level makes all runs with depth faults and returns their number.
func (e *explorer) level(ctx context.Context, depth int, clean outcome) (int, error) {
	firsts := e.next(nil, clean.run, counts{})
	var (
		wg    sync.WaitGroup
		taken atomic.Int64
		total atomic.Int64
		mu    sync.Mutex
		worst = len(firsts) // the first to fail
		found error
	)
	for range min(e.workers, len(firsts)) {
		wg.Go(func() {
			for {
				k := int(taken.Add(1)) - 1
				mu.Lock()
				late := k >= worst
				mu.Unlock()
				if late {
					return
				}
				n, err := e.descend(ctx, firsts[k:k+1:k+1], depth)
				total.Add(int64(n))
				if err == nil {
					continue
				}
				mu.Lock()
				if k < worst {
					worst, found = k, err
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return int(total.Load()), found
}

// descend makes all runs with depth faults that begin with the given ones. Runs
// with fewer faults, made again to learn where the next one can strike, do not
// count.
func (e *explorer) descend(ctx context.Context, faults []memflash.Fault, depth int) (n int, err error) {
	out, err := e.once(ctx, faults)
	if err != nil {
		return 1, e.failure(ctx, faults, err)
	}
	if out.pending > 0 {
		return 0, nil // no operation of the kind was left
	}
	if len(faults) == depth {
		return 1, nil
	}
	for _, f := range e.next(faults, out.all, out.struck) {
		k, err := e.descend(ctx, append(faults[:len(faults):len(faults)], f), depth)
		n += k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// next returns all faults that can follow the given ones, by operation, seed and
// mode, if a run has had end operations, the last fault striking at struck.
func (e *explorer) next(faults []memflash.Fault, end, struck counts) []memflash.Fault {
	var fs []memflash.Fault
	modes := e.faults[len(faults)]
	for at := range max(end.Ops, end.Reads) {
		for seed := range e.seeds {
			for _, f := range modes(uint64(seed + 1)) {
				from, to := struck.Ops, end.Ops
				if f.On == memflash.OpRead {
					from, to = struck.Reads, end.Reads
				}
				if f.At = at; from <= at && at < to {
					fs = append(fs, f)
				}
			}
		}
	}
	return fs
}

// counts numbers what comes next.
type counts struct{ Ops, Reads int }

// outcome says how far a run came.
type outcome struct {
	run, all counts // at the end of Run, and of all
	struck   counts // the earliest place of one more fault
	pending  int    // faults that have not struck
}

// once makes one run in the time allowed.
func (e *explorer) once(ctx context.Context, faults []memflash.Fault) (outcome, error) {
	if err := ctx.Err(); err != nil {
		return outcome{}, err
	}
	if e.timeout == 0 {
		return e.run(ctx, faults)
	}
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	type result struct {
		outcome
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := e.run(ctx, faults)
		done <- result{out, err}
	}()
	select {
	case r := <-done:
		return r.outcome, r.err
	case <-ctx.Done():
	}
	// It may take note.
	t := time.NewTimer(time.Second + e.timeout/10)
	defer t.Stop()
	select {
	case r := <-done:
		if r.err == nil {
			r.err = fmt.Errorf("took more than %v", e.timeout)
		}
		return r.outcome, r.err
	case <-t.C:
		return outcome{}, fmt.Errorf("still running after %v: %w", e.timeout, ErrViolation)
	}
}

// maxResets bounds the calls of Check in one run: each but the last takes a fault.
const maxResets = 100

func (e *explorer) run(ctx context.Context, faults []memflash.Fault) (out outcome, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v: %w\n%s", p, ErrViolation, debug.Stack())
		}
	}()
	d, err := e.s.New(ctx)
	if err != nil {
		return out, fmt.Errorf("setting up: %w", err)
	}
	base := position(d.Chip)
	plan := slices.Clone(faults)
	for i := range plan {
		if plan[i].On == memflash.OpRead {
			plan[i].At += base.Reads
		} else {
			plan[i].At += base.Ops
		}
	}
	d.Chip.Plan(plan...)
	defer func() {
		out.all = position(d.Chip).minus(base)
		out.struck = after(faults)
		if err == nil {
			if err = d.Chip.Err(); err != nil {
				err = fmt.Errorf("misuse of flash: %w: %w", err, ErrViolation)
			}
		}
	}()

	out.pending = d.Chip.Pending()
	err = d.Run(ctx)
	out.run = position(d.Chip).minus(base)
	for resets := 0; ; resets++ {
		struck := d.Chip.Pending() < out.pending
		out.pending = d.Chip.Pending()
		if errors.Is(err, ErrViolation) || err != nil && !struck {
			return out, err
		}
		if resets > 0 && !struck {
			return out, nil
		}
		if resets == maxResets {
			return out, fmt.Errorf("faults still strike after %d resets: %w", resets, ErrViolation)
		}
		lift(d.Chip, plan)
		out.pending = d.Chip.Pending()
		d.Chip.PowerOn()
		err = d.Check(ctx)
	}
}

func position(c *memflash.Chip) counts {
	s := c.Stats()
	return counts{s.Ops, s.Reads}
}

func (c counts) minus(b counts) counts { return counts{c.Ops - b.Ops, c.Reads - b.Reads} }

// after returns where a fault that comes after the given ones can strike first.
// Operations and reads are not in order with each other: faults on reads follow
// faults on reads.
func after(faults []memflash.Fault) (c counts) {
	for _, f := range faults {
		if f.On == memflash.OpRead {
			c.Reads = f.At + 1
		} else {
			c.Ops = f.At + 1
		}
	}
	return c
}

// lift ends the faults of plan that last for ever and have begun.
func lift(c *memflash.Chip, plan []memflash.Fault) {
	if !slices.ContainsFunc(plan, func(f memflash.Fault) bool { return f.Forever }) {
		return
	}
	at := position(c)
	c.Plan(slices.DeleteFunc(slices.Clone(plan), func(f memflash.Fault) bool {
		if f.On == memflash.OpRead {
			return f.At < at.Reads
		}
		return f.At < at.Ops
	})...)
}
