// Package memflash is flash in memory, for tests and simulation. It breaks the
// way real flash and real power supplies break, on demand and reproducibly.
//
// [New] returns one [ota.Flash]. [NewChip] returns a [Chip]: the whole storage
// of one simulated device. All flashes of a Chip share one power supply, one
// numbering of operations and one plan of faults, because a device that loses
// its power loses it everywhere. To cut one flash into several, use
// [ota.Region].
//
// Every WriteAt, every erase unit of an Erase and every Sync is one operation;
// they are numbered from 0 in the order in which they begin, reads likewise but
// apart. A sweep prepares a Chip, runs its scenario on one [Chip.Clone] to learn
// the number of operations, and then runs it on a fresh clone for each operation
// and each way to tear it ([TearModes]): plan the fault, run until
// [ErrPowerOff], [Chip.PowerOn], see what boots. Clones share their memory until
// it is written, so that they cost little even for big flashes.
//
// Nothing here is random: what a fault does follows from its Seed, and equal
// sequences of calls give equal results.
package memflash

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"

	"github.com/slotota/ota"
)

// Errors of a simulated flash, wrapped in an [*Error].
var (
	// ErrPowerOff is what every operation returns from a power cut to PowerOn.
	ErrPowerOff = errors.New("the power is off")
	// ErrFault is an injected failure (kind [Fail]).
	ErrFault = errors.New("injected fault")
	// ErrWorn is an erase of a unit that has reached Config.EraseLimit.
	ErrWorn = errors.New("the erase unit is worn out")
	// ErrNotErased is a write to bytes that were written since they were last
	// erased, or whose last erase was cut short. Nothing is written.
	ErrNotErased = errors.New("not erased")
	// ErrAlign is a write or erase that does not cover whole units.
	ErrAlign = errors.New("not on unit boundaries")
)

// Error says which operation failed, and where.
type Error struct {
	Op       OpKind
	Flash    int   // index in Chip.Flashes
	Off, Len int64 // bytes the operation was about; 0, 0 for a sync
	Err      error
}

// Error formats e on one line.
func (e *Error) Error() string {
	s := "memflash: flash " + strconv.Itoa(e.Flash) + ": " + e.Op.String()
	if e.Op != OpSync {
		s += fmt.Sprintf(" of %d bytes at %d", e.Len, e.Off)
	}
	return s + ": " + e.Err.Error()
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

// MaxSize bounds Config.Size. Memory is only taken for what was written.
const MaxSize = 1 << 36

// Config describes one flash. With Size alone it behaves like a file: it needs
// no erasing, can be written anywhere, reads as zeros at first, and has no cache.
type Config struct {
	// Size is the number of bytes; with EraseUnits it may be 0 for their sum.
	Size int64
	// EraseSize makes the flash an [ota.Eraser] with units of this size, the
	// last one shorter if need be. Initially all of it is erased.
	EraseSize int64
	// EraseUnits lists the sizes of all erase units, for flashes with units of
	// several sizes. EraseSize must then be 0.
	EraseUnits []int64
	// WriteSize is the program unit: writes must cover whole units. It must
	// divide Size and every erase unit. 0 means 1.
	WriteSize int64
	// ErasedZero makes erased bytes read as 0x00 instead of 0xFF; programming
	// then sets bits instead of clearing them.
	ErasedZero bool
	// Rewrite allows what plain NOR can do: to write bytes again between two
	// erasures as long as no bit goes back to its erased value. Without it,
	// every byte is written at most once, as [ota.Eraser] demands.
	Rewrite bool
	// EraseLimit is how often a unit can be erased, if not 0.
	EraseLimit int
	// Unsynced keeps writes and erases in a volatile cache until Sync. A power
	// cut may lose them, see [Loss].
	Unsynced bool
}

// New returns a flash of its own, with its own power supply that never fails. It
// is an [ota.Eraser] only if cfg asks for erasing. If cfg makes no sense, every
// operation returns an error that wraps [ota.ErrInvalid].
func New(cfg Config) ota.Flash { return NewChip(cfg).Flashes()[0] }

// Chip is the storage of one simulated device. But for Equal, its methods may be
// called at any time from any goroutine.
type Chip struct {
	flashes []*flash

	mu    sync.Mutex // guards all below and the regions; never held across a sleep or hook
	off   bool
	stats Stats
	plan  []planned
	hook  func(Op)
	weak  *rand.Rand // decides what weak bits read as
	err   error
}

type planned struct {
	Fault
	struck bool
}

// NewChip returns a Chip with one flash for each configuration, powered on.
func NewChip(cfgs ...Config) *Chip {
	c := &Chip{weak: rand.New(rand.NewPCG(0, 0))}
	for i, cfg := range cfgs {
		r, err := newRegion(cfg)
		if err != nil {
			err = fmt.Errorf("memflash: configuration %d: %w: %w", i, err, ota.ErrInvalid)
			if c.err == nil {
				c.err = err
			}
		}
		c.flashes = append(c.flashes, &flash{c: c, i: i, region: r, bad: err})
	}
	return c
}

// Flashes returns the flashes of c, in the order of their configurations.
func (c *Chip) Flashes() []ota.Flash {
	fs := make([]ota.Flash, len(c.flashes))
	for i, f := range c.flashes {
		fs[i] = f
		if f.unitSize > 0 {
			fs[i] = &eraseFlash{f}
		}
	}
	return fs
}

// Clone returns a copy of c: content, weak bits, unsynced data, wear and power,
// but no planned faults, no hook, and all counters at 0. It copies one pointer
// for every 4 KiB; what c or the clone write later is copied page by page.
func (c *Chip) Clone() *Chip {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := &Chip{weak: rand.New(rand.NewPCG(0, 0)), off: c.off, err: c.err}
	for i, f := range c.flashes {
		d.flashes = append(d.flashes, &flash{c: d, i: i, region: f.region.clone(), bad: f.bad})
	}
	return d
}

// Equal reports whether c and d hold the same bytes, cached ones included, weak
// bits as they were meant to be. Neither may be written meanwhile.
func (c *Chip) Equal(d *Chip) bool {
	return slices.EqualFunc(c.flashes, d.flashes, func(a, b *flash) bool { return a.region.equal(&b.region) })
}

// Stats counts what was done to a [Chip].
type Stats struct {
	Ops   int // writes, erase units and syncs begun with the power on
	Reads int // reads likewise
	// Bytes asked for.
	BytesRead, BytesWritten, BytesErased int64
}

// Stats returns the counters.
func (c *Chip) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

// Ops returns the number of operations so far, which is the number of the next
// one.
func (c *Chip) Ops() int { return c.Stats().Ops }

// Err returns the first misuse of c, or nil: a bad configuration, access that is
// out of bounds or not aligned, or a write to bytes not erased. It tells also of
// errors that the user of a flash has swallowed.
func (c *Chip) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Wear returns how often each erase unit of a flash was erased, in order; nil if
// there is no such flash or it needs no erasing.
func (c *Chip) Wear(flash int) []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if flash < 0 || flash >= len(c.flashes) {
		return nil
	}
	return slices.Clone(c.flashes[flash].wear)
}

// OpKind is a kind of operation, or a set of kinds.
type OpKind uint8

// The kinds of operations.
const (
	OpWrite OpKind = 1 << iota
	OpErase        // of one erase unit
	OpSync
	OpRead

	opMutating = OpWrite | OpErase | OpSync
)

// String returns the names of the kinds in k.
func (k OpKind) String() string {
	s := ""
	for i, name := range []string{"write", "erase", "sync", "read"} {
		if k&(1<<i) == 0 {
			continue
		}
		if s != "" {
			s += "|"
		}
		s += name
	}
	return s
}

// Op is one operation on a flash.
type Op struct {
	Index    int // number of the operation; reads have numbers of their own
	Kind     OpKind
	Flash    int   // index in Chip.Flashes
	Off, Len int64 // 0, 0 for a sync
}

// OnOp has fn called before every operation and read, in the goroutine that
// performs it; nil ends that. fn may call any method of c, and may block.
func (c *Chip) OnOp(fn func(Op)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hook = fn
}

// FlipBit inverts a bit of the medium, at once and whatever the power. Bit 0 is
// the lowest of the byte at off.
func (c *Chip) FlipBit(flash int, off int64, bit uint) error {
	return c.touch("flip", flash, off, 1, func(r *region) { r.alter(off, 1<<(bit&7), 0) })
}

// WeakBit makes a bit of the medium weak: it reads as either value, anew at
// every read, until it is written or erased.
func (c *Chip) WeakBit(flash int, off int64, bit uint) error {
	return c.touch("weaken", flash, off, 1, func(r *region) { r.alter(off, 0, 1<<(bit&7)) })
}

// Peek reads the medium without counting, faults or the need for power. Weak
// bits read as what they were meant to be.
func (c *Chip) Peek(flash int, p []byte, off int64) error {
	return c.touch("peek", flash, off, len(p), func(r *region) { r.read(p, off, nil) })
}

// Poke replaces bytes of the medium without counting, faults, rules, cache or
// the need for power. They count as written.
func (c *Chip) Poke(flash int, p []byte, off int64) error {
	return c.touch("poke", flash, off, len(p), func(r *region) {
		each(off, int64(len(p)), func(k, _, m int, d int64) {
			r.both(k, func() { r.store(p[d:d+int64(m)], nil, off+d) })
		})
	})
}

func (c *Chip) touch(what string, flash int, off int64, n int, fn func(*region)) error {
	if flash < 0 || flash >= len(c.flashes) {
		return fmt.Errorf("memflash: %s: there is no flash %d: %w", what, flash, ota.ErrInvalid)
	}
	r := &c.flashes[flash].region
	if !r.inside(off, int64(n)) {
		return fmt.Errorf("memflash: %s: %d bytes at %d of flash %d are outside of it: %w", what, n, off, flash, ota.ErrInvalid)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	fn(r)
	return nil
}

// flash is one flash of a chip that needs no erasing.
type flash struct {
	c *Chip
	i int
	region
	bad error // what is wrong with the configuration
}

// eraseFlash is one that does.
type eraseFlash struct{ *flash }

func (f *flash) Size() int64      { return f.size }
func (f *flash) WriteSize() int64 { return f.writeSize }

func (f *eraseFlash) EraseSize() int64 { return f.unitSize }
func (f *eraseFlash) ErasedByte() byte { return f.erased }

func (f *eraseFlash) EraseUnit(off int64) (start, n int64) {
	_, start, n = f.unit(off)
	return start, n
}

func (f *flash) error(kind OpKind, off, n int64, err error) error {
	return &Error{Op: kind, Flash: f.i, Off: off, Len: n, Err: err}
}

// misuse records an error that only a wrong caller can get.
func (f *flash) misuse(kind OpKind, off, n int64, err error) error {
	err = f.error(kind, off, n, err)
	if f.c.err == nil {
		f.c.err = err
	}
	return err
}

// check refuses what lies outside of f, or off the grid of unit.
func (f *flash) check(kind OpKind, off, n int64, aligned bool) error {
	err := f.bad
	switch {
	case err != nil:
	case off < 0 || n < 0:
		err = ota.ErrInvalid
	case !f.inside(off, n):
		err = ota.ErrTooLarge
	case !aligned:
		err = ErrAlign
	default:
		return nil
	}
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	return f.misuse(kind, off, n, err)
}

// ReadAt implements io.ReaderAt.
func (f *flash) ReadAt(p []byte, off int64) (int, error) {
	if f.bad != nil || off < 0 {
		return 0, f.check(OpRead, off, int64(len(p)), true)
	}
	var eof error
	if rest := max(0, f.size-off); int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	if len(p) == 0 {
		return 0, eof
	}
	hit, err := f.begin(OpRead, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer f.c.mu.Unlock()
	if hit != nil {
		n, err := f.readHit(hit, p, off)
		if err == nil {
			err = eof
		}
		return n, err
	}
	f.read(p, off, f.c.weak)
	return len(p), eof
}

// WriteAt implements io.WriterAt.
func (f *flash) WriteAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	if err := f.check(OpWrite, off, n, off%f.writeSize == 0 && n%f.writeSize == 0); err != nil || n == 0 {
		return 0, err
	}
	hit, err := f.begin(OpWrite, off, n)
	if err != nil {
		return 0, err
	}
	defer f.c.mu.Unlock()
	if !f.programmable(p, off) {
		return 0, f.misuse(OpWrite, off, n, ErrNotErased)
	}
	if hit != nil {
		return f.writeHit(hit, p, off)
	}
	f.program(p, off)
	f.logWrite(p, off)
	return len(p), nil
}

// Erase implements ota.Eraser, one unit after the other.
func (f *eraseFlash) Erase(off, n int64) error {
	aligned := true
	if n > 0 && f.inside(off, n) {
		_, first, _ := f.unit(off)
		_, last, size := f.unit(off + n - 1)
		aligned = first == off && last+size == off+n
	}
	if err := f.check(OpErase, off, n, aligned); err != nil {
		return err
	}
	for end := off + n; off < end; {
		k, _, size := f.unit(off)
		if err := f.eraseOne(k, off, size); err != nil {
			return err
		}
		off += size
	}
	return nil
}

func (f *flash) eraseOne(k int, off, n int64) error {
	hit, err := f.begin(OpErase, off, n)
	if err != nil {
		return err
	}
	defer f.c.mu.Unlock()
	if f.eraseLimit > 0 && f.wear[k] >= f.eraseLimit {
		return f.error(OpErase, off, n, ErrWorn)
	}
	if hit != nil {
		return f.eraseHit(hit, k, off, n)
	}
	f.wear[k]++
	f.erase(off, n)
	f.logErase(off, n)
	return nil
}

// Sync implements ota.Flash.
func (f *flash) Sync() error {
	if f.bad != nil {
		return f.check(OpSync, 0, 0, true)
	}
	hit, err := f.begin(OpSync, 0, 0)
	if err != nil {
		return err
	}
	defer f.c.mu.Unlock()
	if hit != nil {
		return f.syncHit(hit)
	}
	f.flush()
	return nil
}
