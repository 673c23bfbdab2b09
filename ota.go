package ota

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

// Device is an updatable device: its slots, and the boot loader that selects
// one of them. All methods may be called concurrently. One operation runs at a
// time: whoever comes second gets ErrBusy if an update, a snapshot or
// SetBootState is under way, and otherwise waits for the one store of the boot
// state that precedes it.
type Device struct {
	b       Bootloader
	slots   []Slot
	o       Options
	running SlotID
	opened  time.Time // stands in for the boot time if there is no boot clock

	mu       sync.Mutex    // guards what follows; never held across I/O or calls out
	busy     string        // operation in progress, "" if none
	busyLong bool          // nobody waits for it
	free     chan struct{} // closed when busy ends
	watching bool
	state    BootState
	unstored bool          // nothing was stored yet, state is made up
	doubt    bool          // what is stored may differ from state
	changed  chan struct{} // closed when state changes
	event    Event
	emitted  time.Time
	done     int64 // bytes of the image dealt with
	total    int64 // bytes of the image, 0 if not known
	speed    speed
	counts   *counters // of the newest update or snapshot
	err      error     // failure of the last operation

	// sound marks slots that no power cut has touched since their content was
	// known, but for what their firmware has written to. It belongs to the owner
	// of the device.
	sound [MaxSlots]bool
}

// Options configure a [Device]. The zero value is safe.
type Options struct {
	// Platform must equal the platform of every image. Images that name a
	// platform are refused while it is empty.
	Platform string
	// Product, if not empty, must equal the name of every image.
	Product string
	// Tries is how many boots an uncommitted firmware gets; 0 means 1.
	Tries int
	// SecurityStep bounds by how much the security version of an image may
	// exceed the stored floor; 0 means no bound.
	SecurityStep uint64
	// RequireTrialID makes Commit refuse what does not name its trial.
	RequireTrialID bool

	// Hooks run on the first boot of a new firmware, before Checks, in order:
	// to carry settings over from the slot at oldSlot, for example. An error
	// reverts.
	Hooks []Hook
	// Checks must all pass before an uncommitted firmware commits itself. An
	// error reverts.
	Checks []Check
	// CheckTimeout bounds each hook and each check; 0 means one minute.
	CheckTimeout time.Duration
	// CommitWhenHealthy makes Watch commit as soon as all Hooks and Checks
	// have passed, also when there is a commit timeout.
	CommitWhenHealthy bool

	// BootClock returns the time since the device booted, including time in
	// suspend. nil means /proc/uptime where there is one, else the time since
	// Open, which a restart of the process restarts. An error during a trial
	// reverts.
	BootClock func() (time.Duration, error)
	// Reset restarts the device. nil makes Reboot return ErrUnsupported.
	Reset func(ctx context.Context) error

	// Watchdog, if not nil, opens and starts a hardware watchdog. Watch does so for
	// a trial, and feeds it while hooks and checks run within their time and while it
	// waits for the commit: if the kernel hangs, or the process hangs or ends, the
	// device is reset and goes back. The watchdog is disarmed after the commit, but
	// left running before a reboot, and when the context of Watch ends, so that it
	// bounds the time until another process continues the trial. It is not fed while
	// the boot state is stored: its timeout must be longer than that takes. If
	// it cannot be opened the trial goes on without.
	Watchdog func(ctx context.Context) (Watchdog, error)
	// Health, if not nil, says what would stop a rollback on this machine. Status
	// calls it, and so it should not do more than read a few small files.
	Health func() []Finding

	// OnEvent is told about every change of phase and, at most ten times per
	// second, about progress. Calls come from the goroutine that does the
	// work, one at a time, and delay it. They must not call a method of the
	// Device that changes its state.
	OnEvent func(Event)
	// Logger gets a few lines for each operation; nil means silence.
	Logger *slog.Logger
	// BufferSize is the size of the blocks in which an install or copy reads,
	// checks, writes and reads back; 0 leaves it to the medium and is 512 KiB at
	// most. There are nine blocks in memory at a time, and a few more for images
	// with chunks that are larger than a block. A block holds one erase unit at
	// least. So an update takes 2.3 MiB by default, 4.5 MiB on disks, 300 KiB with
	// a BufferSize of 32 KiB.
	BufferSize int
}

// Hook is something to be done on the first boot of a new firmware. oldSlot is
// the revert slot: after CreateSnapshot with SetAsRevert that is the snapshot.
type Hook struct {
	Name string
	Run  func(ctx context.Context, newSlot, oldSlot SlotID) error
}

// Check says whether the running firmware works.
type Check struct {
	Name string
	Run  func(ctx context.Context) error
}

// UpdateOptions configure one update. The zero value is safe.
type UpdateOptions struct {
	// CommitTimeout is the time the new firmware has to be committed in, from
	// its boot; rounded up to whole seconds. 0 lets it commit itself once its
	// health checks have passed.
	CommitTimeout time.Duration
	// IgnoreSameVersion makes Update do nothing if the image has the version
	// and build id of the running firmware.
	IgnoreSameVersion bool
}

// UpdateResult says what an update did.
type UpdateResult struct {
	// Slot is the slot written, NoSlot if none was.
	Slot SlotID
	// Trial identifies the trial that the next boot starts.
	Trial TrialID
	// Same says that nothing was done because the image is what already runs.
	Same bool
	Counts
}

// Counts says where the bytes of an image came from, and what became of them. In
// the end Written and Skipped add up to the size of the slot's parts in the image.
type Counts struct {
	// Downloaded is what was transferred over a network for the image, with all
	// that is not installed; 0 if the image does not count it, see [Downloader].
	Downloaded int64
	// Read counts the bytes of parts that were taken from the image.
	Read int64
	// Copied counts the bytes that another slot held and that were not read.
	Copied int64
	// Skipped counts the bytes that were in place: neither erased nor written.
	Skipped int64
	// Written counts the bytes that were written, or erased to be blank.
	Written int64
}

// SnapshotOptions configure [Device.CreateSnapshot].
type SnapshotOptions struct {
	// SetAsRevert puts the running firmware on trial once more, with the
	// snapshot to go back to: the next boot is a first boot.
	SetAsRevert bool
	// CommitTimeout is that of the new trial.
	CommitTimeout time.Duration
}

// BootStatePatch is a change of the boot state; nil fields stay as they are.
type BootStatePatch struct {
	Active        *SlotID
	Committed     *bool
	Revert        *SlotID
	CommitTimeout *time.Duration
}

// Phase is what a device is doing.
type Phase uint8

// The phases of an operation, in the order they are passed through.
const (
	PhaseIdle      Phase = iota
	PhaseChecking        // the image or a slot is examined
	PhaseErasing         // what lies behind the data is erased
	PhaseWriting         // data is read, and written where it differs
	PhaseVerifying       // what was written is read back
	PhaseStoring         // the boot state is stored
	PhaseDone            // the operation succeeded
	PhaseFailed          // the operation failed
)

// String returns a word for p.
func (p Phase) String() string {
	return word(p, "idle", "checking", "erasing", "writing", "verifying", "storing", "done", "failed")
}

// Event reports the progress of an operation.
type Event struct {
	Op    string // "update", "snapshot", "commit", "revert", "setbootstate", "boot"
	Phase Phase
	Slot  SlotID // slot concerned, or NoSlot
	Part  string // part concerned, or ""
	// Done and Total count bytes of the current phase and part.
	Done, Total int64
	// Skipped says that the part was found in place and is not written.
	Skipped bool
	// Counts is about the whole update or snapshot so far.
	Counts Counts
	// Err is the failure, in an event of PhaseFailed.
	Err error
}

// Status is a summary for people and remote tools.
type Status struct {
	// Running is the slot whose firmware executes now.
	Running SlotID
	// State is the boot state.
	State BootState
	// Event is the newest progress report, Phase PhaseIdle if there was none.
	Event Event
	// Busy names the operation in progress, "" if there is none.
	Busy string
	// Progress is how much of the image of an update was dealt with, 0 to 1.
	Progress float64
	// Rate is how many bytes of the image were dealt with per second, of late.
	Rate float64
	// ETA is how long the rest of the image will take at that rate, 0 if that is
	// not known or there is no update in progress.
	ETA time.Duration
	// Counts is about the newest update or snapshot since the start.
	Counts Counts
	// Err is the failure of the last operation since the start, or nil.
	Err error
	// RebootPending says that the running slot is not the active one, or that
	// the firmware waits for its trial boot.
	RebootPending bool
	// Remaining is the time left to commit, if Trial.
	Remaining time.Duration
	// Trial says that the running firmware is on trial.
	Trial bool
	// Findings are what Options.Health says.
	Findings []Finding
}

// Open returns the device that consists of slots, numbered from 0 in their
// order, and b. It loads the boot state, healed if b can, and takes note if the
// boot loader started another slot than the state selects: Status reports it.
//
// If nothing was ever stored the running firmware counts as committed: it is
// what the device came with. If a stored state was lost it counts as on trial.
func Open(ctx context.Context, b Bootloader, slots []Slot, o *Options) (*Device, error) {
	const op = "open"
	if o == nil {
		o = &Options{}
	}
	if err := checkSlots(slots); err != nil {
		return nil, opErr(op, NoSlot, err)
	}
	d := &Device{b: b, slots: slots, o: *o, opened: time.Now(), changed: make(chan struct{}), counts: &counters{}}
	if d.o.Tries < 0 || d.o.Tries > maxTries || d.o.BufferSize < 0 {
		return nil, opErr(op, NoSlot, fmt.Errorf("options: Tries or BufferSize out of range: %w", ErrInvalid))
	}
	d.o.Tries = max(d.o.Tries, 1)
	if l, ok := b.(TryLimiter); ok && l.MaxTries() > 0 && d.o.Tries > l.MaxTries() {
		return nil, opErr(op, NoSlot, fmt.Errorf("options: %d Tries, the boot loader can count to %d: %w", d.o.Tries, l.MaxTries(), ErrInvalid))
	}
	if d.o.Logger == nil {
		d.o.Logger = slog.New(slog.DiscardHandler)
	}
	var err error
	if d.running, err = b.Running(ctx); err != nil {
		return nil, opErr(op, NoSlot, err)
	}
	if d.slot(d.running) == nil {
		return nil, opErr(op, d.running, ErrUnknownSlot)
	}
	if d.state, d.unstored, err = d.load(ctx); err != nil {
		return nil, opErr(op, NoSlot, err)
	}
	if err := d.reconcile(ctx); ctx.Err() != nil {
		return nil, opErr(op, NoSlot, ctx.Err())
	} else if err != nil {
		// A device that cannot write its record still has to be reached.
		d.err = opErr(op, NoSlot, err)
		d.o.Logger.Error("the fallback could not be stored", "err", err)
	}
	return d, nil
}

// maxTries bounds Options.Tries.
const maxTries = 255

// slot returns slot id, or nil if there is none.
func (d *Device) slot(id SlotID) *Slot {
	if id < 0 || int(id) >= len(d.slots) {
		return nil
	}
	return &d.slots[id]
}

// load loads the boot state, or makes up the one that stands for its absence:
// unstored if there never was any.
func (d *Device) load(ctx context.Context) (s BootState, unstored bool, err error) {
	s, err = loadHealed(ctx, d.b)
	switch {
	case errors.Is(err, ErrNoBootState):
		return BootState{Active: d.running, Committed: true, Revert: NoSlot}, true, nil
	case errors.Is(err, ErrBadBootState):
		return lostState(d.running, NoSlot, 0), false, nil
	case err != nil:
		return BootState{}, false, err
	}
	return s, false, checkState(s, d.slots)
}

// reconcile takes note of a fallback by the boot loader.
func (d *Device) reconcile(ctx context.Context) error {
	s := d.state
	if s.Active == d.running {
		return nil
	}
	var next BootState
	switch {
	case s.lost():
		// The slots take turns; the boot stage could not store whose it is.
		next = lostState(d.running, s.Active, 0)
	case !s.Committed && s.Booted, s.Committed && !s.Slot(d.running).Rejected:
		next = s.reverted(ReasonBootloader, "", true)
		next.Active = d.running
	default:
		// Installed or reverted, and the reboot has not happened yet.
		return nil
	}
	d.o.Logger.Warn("the boot loader fell back", "selected", s.Active, "running", d.running)
	return d.store(ctx, next)
}

// begin makes the caller the owner of the device for operation op. An operation
// that is long, or comes while a long one is under way, gets ErrBusy instead of
// waiting.
func (d *Device) begin(ctx context.Context, op string, long bool) error {
	for {
		d.mu.Lock()
		if d.busy == "" {
			d.busy, d.busyLong, d.free = op, long, make(chan struct{})
			doubt := d.doubt
			d.mu.Unlock()
			if !doubt {
				return nil
			}
			err := d.resolve(ctx)
			if err != nil {
				d.end()
			}
			return err
		}
		busy, wait := d.busy, d.free
		// During a trial what is long is about to be refused.
		refuse := long || d.busyLong && d.state.Committed
		d.mu.Unlock()
		if refuse {
			return fmt.Errorf("%s in progress: %w", busy, ErrBusy)
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// end gives up what begin took.
func (d *Device) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.busy = ""
	close(d.free)
}

// resolve finds out what is stored after a failed store left it in doubt.
func (d *Device) resolve(ctx context.Context) error {
	s, unstored, err := d.load(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStateUnknown, err)
	}
	d.setState(s, unstored)
	return nil
}

// fresh reports whether nothing was stored yet.
func (d *Device) fresh() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.unstored
}

// current returns the boot state. Its slices are shared and never written to.
func (d *Device) current() BootState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

func (d *Device) setState(s BootState, unstored bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state, d.unstored, d.doubt = s, unstored, false
	close(d.changed)
	d.changed = make(chan struct{})
}

// store makes next the durable boot state and reads it back. The caller is the
// owner. When it fails, the state is the old one, or in doubt until the next
// operation finds out.
func (d *Device) store(ctx context.Context, next BootState) error {
	err := storeState(ctx, d.b, next)
	if err == nil {
		d.setState(next, false)
		return nil
	}
	// Either state may be stored now: make it one of them for certain.
	got, unstored, lerr := d.load(context.WithoutCancel(ctx))
	if lerr != nil {
		d.mu.Lock()
		d.doubt = true
		d.mu.Unlock()
		return fmt.Errorf("%w: %w", ErrStateUnknown, errors.Join(err, lerr))
	}
	d.setState(got, unstored)
	if got.Equal(next) {
		return nil
	}
	return err
}

// storeState stores s with b and reads it back.
func storeState(ctx context.Context, b Bootloader, s BootState) error {
	if err := b.Store(ctx, s); err != nil {
		return err
	}
	got, err := b.Load(ctx)
	if err != nil {
		return fmt.Errorf("reading the boot state back: %w", err)
	}
	if !got.Equal(s) {
		return fmt.Errorf("the boot loader did not keep what was stored: %w", ErrStateUnknown)
	}
	return nil
}

// Update installs img into a slot that is neither running nor selected,
// verifies it by reading it back, and selects it for a trial: the next boot
// starts it, and unless Commit comes in time the one after returns to the
// running firmware. Update does not reboot.
//
// Everything about the image and the device is checked before the first byte is
// erased. If Update fails or ctx ends, the boot state selects what it selected
// before, and only the slot being written has lost its content. Parts of the
// image that the slot does not have are passed over.
func (d *Device) Update(ctx context.Context, img Image, o *UpdateOptions) (UpdateResult, error) {
	const op = "update"
	if o == nil {
		o = &UpdateOptions{}
	}
	res := UpdateResult{Slot: NoSlot}
	timeout, err := commitTimeout(o.CommitTimeout)
	if err != nil {
		return res, opErr(op, NoSlot, err)
	}
	if err := d.begin(ctx, op, true); err != nil {
		return res, opErr(op, NoSlot, err)
	}
	defer d.end()
	err = d.update(ctx, img, timeout, o.IgnoreSameVersion, &res)
	err = opErr(op, res.Slot, err)
	d.finish(op, res.Slot, err)
	res.Counts = d.counted()
	if err != nil {
		return UpdateResult{Slot: NoSlot, Counts: res.Counts}, err
	}
	return res, nil
}

func (d *Device) update(ctx context.Context, img Image, timeout time.Duration, ignoreSame bool, res *UpdateResult) error {
	s := d.current()
	info := img.Info()
	d.start()
	d.track(img)
	if err := d.idle(s); err != nil {
		return err
	}
	if err := d.admit(s, &info); err != nil {
		return err
	}
	if ignoreSame && d.same(s, &info) {
		res.Same = true
		return nil
	}
	target, err := d.target(s, func(id SlotID) (bool, error) { return d.holds(s, id, &info) })
	if err != nil {
		return err
	}
	res.Slot = target
	w := d.writer()
	next := s.Clone()
	if err := w.measure(ctx, &next); err != nil {
		return err
	}
	w.id = target
	st := SlotState{Security: info.Security, Version: cut(info.Version, MaxVersion), BuildID: cut(info.BuildID, MaxVersion)}
	if st.Parts, err = w.fill(ctx, img, &info, &next); err != nil {
		return err
	}
	next.setSlot(target, st)
	next = next.trial(target, d.running, timeout, d.o.Tries)
	d.emit(Event{Phase: PhaseStoring, Slot: target})
	if err := d.store(ctx, next); err != nil {
		return err
	}
	res.Trial = next.Trial
	return nil
}

// idle refuses to touch any slot while a trial or a reboot is pending.
func (d *Device) idle(s BootState) error {
	switch {
	case !s.Committed:
		return ErrNotCommitted
	case s.Active != d.running:
		return ErrRebootPending
	}
	return nil
}

// admit checks everything about an image that does not depend on the slot.
func (d *Device) admit(s BootState, info *ImageInfo) error {
	switch {
	case len(info.SignedBy) == 0 && !info.Unsigned:
		return ErrUnverified
	case info.Platform != d.o.Platform:
		return fmt.Errorf("image for %s, device is %s: %w", Quote(info.Platform), Quote(d.o.Platform), ErrPlatform)
	case d.o.Product != "" && info.Name != d.o.Product:
		return fmt.Errorf("image of %s, device is %s: %w", Quote(info.Name), Quote(d.o.Product), ErrProduct)
	case info.Security < s.Floor:
		return fmt.Errorf("security version %d, need %d: %w", info.Security, s.Floor, ErrRollback)
	}
	for _, step := range []uint64{d.o.SecurityStep, info.SecurityStep} {
		if step != 0 && info.Security-s.Floor > step {
			return fmt.Errorf("security version %d, floor %d, step at most %d: %w", info.Security, s.Floor, step, ErrStep)
		}
	}
	for i, p := range info.Parts {
		if info.part(p.Name) != &info.Parts[i] {
			return inPart(p.Name, fmt.Errorf("described twice: %w", ErrInvalid))
		}
		if p.SHA256 == nil && !info.Unsigned {
			return inPart(p.Name, fmt.Errorf("signed, but without a digest: %w", ErrUnverified))
		}
		if p.Chunks != nil && (p.SHA256 == nil || !p.Chunks.valid(p.Size)) {
			return inPart(p.Name, fmt.Errorf("%d chunks of %d bytes for %d bytes: %w", len(p.Chunks.SHA256), p.Chunks.Size, p.Size, ErrInvalid))
		}
	}
	return nil
}

// same reports whether the image is the firmware that runs, by its version and
// build id or by the digests of all its parts.
func (d *Device) same(s BootState, info *ImageInfo) bool {
	cur := s.Slot(d.running)
	if info.BuildID != "" && cur.Version == cut(info.Version, MaxVersion) && cur.BuildID == cut(info.BuildID, MaxVersion) {
		return true
	}
	same, err := d.holds(s, d.running, info)
	return same && err == nil
}

// holds reports whether slot id is known to hold exactly the parts of the
// image, and an error if the image does not fit there.
func (d *Device) holds(s BootState, id SlotID, info *ImageInfo) (bool, error) {
	slot, st := &d.slots[id], s.Slot(id)
	held := len(st.Parts) == len(slot.Parts)
	for i, p := range slot.Parts {
		want := info.part(p.Name)
		if want == nil {
			return false, &Error{Slot: id, Part: p.Name, Off: -1, Err: ErrIncomplete}
		}
		if err := fits(p.Flash, want.Size); err != nil {
			return false, &Error{Slot: id, Part: p.Name, Off: -1, Err: err}
		}
		held = held && want.SHA256 != nil && st.Parts[i] == PartState{want.Size, *want.SHA256}
	}
	return held, nil
}

// target chooses the slot to write among those that are neither running nor
// selected nor read-only, and that check accepts: first one that already holds
// the image, then one with nothing of value, then the lowest.
func (d *Device) target(s BootState, check func(SlotID) (holds bool, err error)) (SlotID, error) {
	best, bestRank, reason := NoSlot, 0, error(ErrNoTarget)
	for i := range d.slots {
		id := SlotID(i)
		if id == d.running || id == s.Active || d.slots[i].ReadOnly {
			continue
		}
		holds, err := check(id)
		if err != nil {
			if reason == error(ErrNoTarget) {
				reason = err
			}
			continue
		}
		rank := 1
		switch st := s.Slot(id); {
		case holds:
			rank = 4
		case len(st.Parts) == 0 || st.Rejected:
			rank = 3
		case id != s.Revert:
			rank = 2
		}
		if rank > bestRank {
			best, bestRank = id, rank
		}
	}
	if best == NoSlot {
		return NoSlot, reason
	}
	return best, nil
}

// slotWriter fills or checks slots on behalf of an operation.
type slotWriter struct {
	d    *Device
	in   *installer
	id   SlotID // slot being read or written
	part string
	base int64 // bytes of the image done before this part
}

func (d *Device) writer() *slotWriter {
	w := &slotWriter{d: d, id: d.running}
	d.mu.Lock()
	counts := d.counts
	d.mu.Unlock()
	w.in = newInstaller(d.o.BufferSize, counts, func(phase Phase, done, total int64) {
		if phase == PhaseWriting {
			d.consumed(w.base + done)
		}
		d.emit(Event{Phase: phase, Slot: w.id, Part: w.part, Done: done, Total: total})
	})
	return w
}

// measure makes sure that next knows the digests of the running slot: what a
// trial may fall back to must be verifiable at boot.
func (w *slotWriter) measure(ctx context.Context, next *BootState) error {
	slot, st := &w.d.slots[w.d.running], next.Slot(w.d.running)
	if len(st.Parts) == len(slot.Parts) {
		return nil
	}
	st.Parts = nil
	for _, p := range slot.Parts {
		w.part = p.Name
		sum, err := w.in.digest(ctx, p.Flash, p.Flash.Size())
		if err != nil {
			return opErr("", w.d.running, inPart(p.Name, err))
		}
		st.Parts = append(st.Parts, PartState{p.Flash.Size(), sum})
	}
	st.Approved = true
	next.setSlot(w.d.running, st)
	return nil
}

// fill makes slot w.id hold the parts of img, verified by reading them back.
// Before anything is erased, next and the stored boot state forget the slot.
func (w *slotWriter) fill(ctx context.Context, img Image, info *ImageInfo, next *BootState) ([]PartState, error) {
	slot := &w.d.slots[w.id]
	states := make([]written, len(slot.Parts))
	state := make([]partFill, len(slot.Parts))
	var total int64
	for _, p := range slot.Parts {
		total += info.part(p.Name).Size
	}
	w.d.expect(total)
	old := next.Slot(w.id)
	known := next.Clone()
	change := false
	for i, p := range slot.Parts {
		want := info.part(p.Name)
		if ok, err := w.holds(ctx, &old, i, p, want); err != nil {
			return nil, err
		} else if ok {
			state[i], states[i].PartState = partKept, old.Parts[i]
			w.in.counts.skipped.Add(want.Size)
		} else {
			change = true
		}
	}
	if change {
		if err := w.forget(ctx, next); err != nil {
			return nil, err
		}
	}

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for {
		ip, err := img.Next(ctx)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		i := slot.index(ip.Name)
		if i < 0 || state[i] == partKept {
			// Not for this device, or found in place.
			if sel, ok := ip.Data.(Selector); ok {
				if err := sel.Select(nil); err != nil {
					return nil, inPart(ip.Name, err)
				}
			}
			continue
		}
		want := info.part(ip.Name)
		if state[i] != partMissing || ip.Size != want.Size {
			return nil, inPart(ip.Name, fmt.Errorf("comes twice, or differs from its description: %w", ErrInvalid))
		}
		w.part = ip.Name
		states[i], err = w.in.install(ctx, &job{
			f: slot.Parts[i].Flash, want: want, data: ip.Data, stop: stop,
			suspect: !w.d.sound[w.id] || slot.Parts[i].Mutable, others: w.others(&known, ip.Name),
		})
		if err != nil {
			w.d.sound[w.id] = w.d.sound[w.id] && !w.in.failed
			return nil, inPart(ip.Name, err)
		}
		if want.SHA256 != nil && *want.SHA256 != states[i].SHA256 {
			return nil, inPart(ip.Name, ErrDigest)
		}
		state[i] = partWritten
		w.base += want.Size
	}
	parts := make([]PartState, len(states))
	for i, p := range slot.Parts {
		w.part = p.Name
		switch state[i] {
		case partMissing:
			return nil, inPart(p.Name, ErrIncomplete)
		case partWritten:
			if err := w.in.verify(ctx, p.Flash, states[i]); err != nil {
				return nil, inPart(p.Name, err)
			}
		}
		parts[i] = states[i].PartState
	}
	w.d.sound[w.id] = true
	return parts, nil
}

// others returns what parts of this name other slots hold, first the running one.
// What the firmware writes to may change while it is read.
func (w *slotWriter) others(s *BootState, name string) []source {
	var all []source
	for i := range w.d.slots {
		slot := &w.d.slots[i]
		k := slot.index(name)
		if SlotID(i) == w.id || k < 0 || slot.Parts[k].Mutable {
			continue
		}
		from := source{id: SlotID(i), f: slot.Parts[k].Flash, size: slot.Parts[k].Flash.Size()}
		if st := s.Slot(SlotID(i)); k < len(st.Parts) {
			from.size = min(from.size, st.Parts[k].Size)
		}
		if SlotID(i) == w.d.running {
			all = append([]source{from}, all...)
		} else {
			all = append(all, from)
		}
	}
	return all
}

// partFill is how far a part of the target slot is.
type partFill uint8

const (
	partMissing partFill = iota
	partKept             // found in place and verified
	partWritten          // written, to be read back
)

// holds reports whether part i of the target slot already holds want, as the
// boot state says and the medium confirms.
func (w *slotWriter) holds(ctx context.Context, st *SlotState, i int, p Part, want *PartInfo) (bool, error) {
	if want.SHA256 == nil || i >= len(st.Parts) || st.Parts[i] != (PartState{want.Size, *want.SHA256}) {
		return false, nil
	}
	w.part = p.Name
	if err := w.in.verify(ctx, p.Flash, written{PartState: st.Parts[i]}); err != nil {
		return false, ctx.Err() // whatever is wrong with it, it is written anew
	}
	w.base += want.Size
	w.d.consumed(w.base)
	w.d.emit(Event{Phase: PhaseVerifying, Slot: w.id, Part: p.Name, Done: want.Size, Total: want.Size, Skipped: true})
	return true, nil
}

// forget makes next and the stored boot state forget what the slot holds.
func (w *slotWriter) forget(ctx context.Context, next *BootState) error {
	if len(next.Slot(w.id).Parts) > 0 {
		w.d.sound[w.id] = true // nobody has written to it since it was verified
	}
	// If nothing is stored any slot may be started.
	known := len(next.Slot(w.id).Parts) > 0 || next.Revert == w.id || w.d.fresh()
	next.setSlot(w.id, SlotState{})
	if next.Revert == w.id {
		next.Revert = NoSlot
	}
	if !known {
		return nil
	}
	w.d.emit(Event{Phase: PhaseStoring, Slot: w.id})
	return w.d.store(ctx, next.Clone())
}

// Reboot restarts the device with Options.Reset.
func (d *Device) Reboot(ctx context.Context) error {
	if d.o.Reset == nil {
		return opErr("reboot", NoSlot, ErrUnsupported)
	}
	return opErr("reboot", NoSlot, d.o.Reset(ctx))
}

// Running returns the slot whose firmware executes now.
func (d *Device) Running() SlotID { return d.running }

// Status returns a summary of the device. It does not wait for flash.
func (d *Device) Status() Status {
	d.mu.Lock()
	s := Status{
		Running: d.running,
		State:   d.state.Clone(),
		Event:   d.event,
		Busy:    d.busy,
		Err:     d.err,
	}
	if d.total > 0 {
		s.Progress = min(float64(d.done)/float64(d.total), 1)
	}
	if d.busyLong && d.busy != "" {
		s.Rate = d.speed.rate
		s.ETA = d.speed.left(d.total - d.done)
	}
	d.mu.Unlock()
	s.Counts = d.counted()
	s.Trial = d.onTrial(s.State)
	s.RebootPending = s.State.Active != d.running || !s.State.Committed && !s.State.Booted
	if s.Trial && s.State.CommitTimeout > 0 {
		if left, err := d.remaining(s.State); err == nil {
			s.Remaining = max(left, 0)
		}
	}
	if d.o.Health != nil {
		s.Findings = d.o.Health()
	}
	return s
}

// eventInterval is the shortest time between two progress reports of a phase.
const eventInterval = 100 * time.Millisecond

// start begins the progress reports of an operation.
func (d *Device) start() {
	d.mu.Lock()
	d.done, d.total, d.err = 0, 0, nil
	d.mu.Unlock()
	d.emit(Event{Phase: PhaseChecking, Slot: NoSlot})
}

// emit reports e for the operation in progress, unless it only continues what
// was reported a moment ago.
func (d *Device) emit(e Event) {
	now := time.Now()
	e.Counts = d.counted()
	d.mu.Lock()
	e.Op = d.busy
	last := d.event
	more := e.Phase == last.Phase && e.Slot == last.Slot && e.Part == last.Part && e.Op == last.Op && e.Skipped == last.Skipped
	quiet := more && e.Done < e.Total && now.Sub(d.emitted) < eventInterval
	d.event = e
	if !quiet {
		d.emitted = now
	}
	d.mu.Unlock()
	if !quiet && d.o.OnEvent != nil {
		d.o.OnEvent(e)
	}
}

// expect notes how many bytes the image has.
func (d *Device) expect(n int64) {
	d.mu.Lock()
	d.total = n
	d.mu.Unlock()
}

// consumed notes how many of them have been dealt with.
func (d *Device) consumed(n int64) {
	now := time.Now()
	d.mu.Lock()
	d.done = n
	d.speed.note(n, now)
	d.mu.Unlock()
}

// track begins to count for an update from img, or for a snapshot.
func (d *Device) track(img Image) {
	c := &counters{}
	if l, ok := img.(Downloader); ok {
		c.fetched = l.Downloaded
	}
	d.mu.Lock()
	d.counts, d.speed = c, speed{}
	d.mu.Unlock()
}

// counted returns the counts of the newest update or snapshot.
func (d *Device) counted() Counts {
	d.mu.Lock()
	c := d.counts
	d.mu.Unlock()
	if c == nil {
		return Counts{}
	}
	return c.sum()
}

// speed is how fast an image is dealt with, by the monotonic clock.
type speed struct {
	at   time.Time // of the newest sample
	done int64
	rate float64 // bytes per second, 0 if not known
}

// Samples are taken this often, and weigh less after this time.
const (
	speedStep = time.Second / 2
	speedSpan = 5 * time.Second
)

// note takes note that n bytes are done now.
func (s *speed) note(n int64, now time.Time) {
	if s.at.IsZero() {
		s.at, s.done = now, n
		return
	}
	took := now.Sub(s.at)
	if took < speedStep {
		return
	}
	rate := float64(n-s.done) / took.Seconds()
	if s.rate > 0 {
		rate = s.rate + (rate-s.rate)*min(1, float64(took)/float64(speedSpan))
	}
	s.at, s.done, s.rate = now, n, rate
}

// left returns how long n more bytes take, 0 if that is not known.
func (s *speed) left(n int64) time.Duration {
	if s.rate <= 0 || n <= 0 {
		return 0
	}
	return time.Duration(min(float64(n)/s.rate, 1e6) * float64(time.Second))
}

// finish reports the end of an operation.
func (d *Device) finish(op string, slot SlotID, err error) {
	final := &counters{last: d.counted()}
	d.mu.Lock()
	d.err = err
	d.counts = final // the image is the caller's again
	d.mu.Unlock()
	e := Event{Phase: PhaseDone, Slot: slot}
	if err != nil {
		e.Phase, e.Err = PhaseFailed, err
		d.o.Logger.Error(op+" failed", "err", err)
	} else {
		d.o.Logger.Info(op+" done", "slot", slot)
	}
	d.emit(e)
}

// commitTimeout checks a commit timeout and rounds it up to whole seconds.
func commitTimeout(t time.Duration) (time.Duration, error) {
	if t < 0 || t > MaxCommitTimeout {
		return 0, fmt.Errorf("commit timeout %v: need 0 to %v: %w", t, time.Duration(MaxCommitTimeout), ErrInvalid)
	}
	return (t + time.Second - 1) / time.Second * time.Second, nil
}

// cut shortens s to n bytes at most, at the border of a character.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xc0 == 0x80 {
		n--
	}
	return s[:n]
}
