package statemachine

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/slotota/ota/rpcjson"
)

// Config describes a machine.
type Config struct {
	Geometry sim.Geometry // with 2 or 3 slots, and 3 copies of the record
	Tries    int          // 0 means 1
}

// Machine is a simulated device that is compared with the model at every step.
// Its operations return an error if the device does what the model does not
// allow; the machine is of no use after that. When the power fails during an
// operation, the machine boots again by itself.
//
// Not safe for concurrent use. Close it when it is no longer needed.
type Machine struct {
	d     *sim.Device
	tries int
	dev   *ota.Device
	srv   *rpcjson.Server
	push  *push

	state State
	ids   []ota.TrialID // of the trials seen, in order
	now   time.Duration // since the boot
	marks []mark        // damage to slots

	// One copy of the record may be damaged at a time, beside power cuts.
	spare bool // none is
	weak  bool // the damaged one may look sound, so that only a store repairs it

	// What was promised, kept apart from the model.
	floor uint64       // of acknowledged commits
	dead  map[int]bool // trials that must not run (again)
	runs  map[int]int  // boots of each trial
	wrote atomic.Pointer[error]

	resets atomic.Int64
	giveUp context.CancelFunc // ends Watch, which would try to commit for ever
	stats  Stats
}

// Stats counts what a machine went through.
type Stats struct{ Ops, Updates, Commits, Boots, Cuts, Faults, Repairs int }

// Add adds t to s.
func (s *Stats) Add(t Stats) {
	s.Ops += t.Ops
	s.Updates += t.Updates
	s.Commits += t.Commits
	s.Boots += t.Boots
	s.Cuts += t.Cuts
	s.Faults += t.Faults
	s.Repairs += t.Repairs
}

// mark is a flipped bit of a slot.
type mark struct {
	slot    ota.SlotID
	version int
	off     int64
	bit     uint
}

// New returns a machine that has just booted its factory firmware.
func New(c Config) (*Machine, error) {
	d, err := sim.New(c.Geometry)
	if err != nil {
		return nil, err
	}
	if len(d.Slots) > MaxSlots {
		return nil, fmt.Errorf("%d slots", len(d.Slots))
	}
	m := &Machine{d: d, tries: max(c.Tries, 1), state: Initial(), spare: true, dead: map[int]bool{}, runs: map[int]int{}}
	d.Chip.OnOp(m.watchWrites)
	return m, m.boot([]State{m.state})
}

// Close stops what runs in the background and reports misuse of the flash.
func (m *Machine) Close() error {
	m.hangUp()
	return m.d.Chip.Err()
}

// State returns the state, as the device and the model agree on it.
func (m *Machine) State() State { return m.state }

// Env returns what operations depend on at the moment.
func (m *Machine) Env() Env {
	return Env{
		Slots: len(m.d.Slots), Tries: m.tries, Next: len(m.ids) + 1, Up: m.now,
		Holds: func(id ota.SlotID, v int) bool { return m.d.Identify(id) == v },
	}
}

// Stats returns what happened so far.
func (m *Machine) Stats() Stats { return m.stats }

// Wear returns how often each erase unit of each copy of the record was erased.
func (m *Machine) Wear() (wear []int) {
	for i := 2 * len(m.d.Slots); i < len(m.d.Chip.Flashes()); i++ {
		wear = append(wear, m.d.Chip.Wear(i)...)
	}
	return wear
}

// Spare reports whether the record can take damage to a copy.
func (m *Machine) Spare() bool { return m.spare }

// Pushing reports whether a push session is under way, and has begun to be
// installed.
func (m *Machine) Pushing() (open, busy bool) { return m.push != nil, m.push != nil && m.push.off > 0 }

// Planned reports whether a fault is still to come.
func (m *Machine) Planned() bool { return m.d.Chip.Pending() > 0 }

// watchWrites notes writes to slots that must not be written.
func (m *Machine) watchWrites(op memflash.Op) {
	id := ota.SlotID(op.Flash / 2)
	if op.Kind == memflash.OpRead || int(id) >= len(m.d.Slots) {
		return
	}
	var err error
	if m.dev == nil {
		err = fmt.Errorf("%v in slot %v during the boot", op.Kind, id)
	} else if s, serr := m.dev.BootState(context.Background()); serr != nil || !s.Committed {
		err = fmt.Errorf("%v in slot %v during a trial (%v)", op.Kind, id, serr)
	} else if id == m.dev.Running() || id == s.Active || id == s.Revert {
		err = fmt.Errorf("%v in slot %v, which is running or selected", op.Kind, id)
	}
	if err != nil {
		m.wrote.CompareAndSwap(nil, &err)
	}
}

// off reports whether the power has failed.
func (m *Machine) off() bool {
	_, err := m.d.Chip.Flashes()[0].ReadAt(make([]byte, 1), 0)
	return errors.Is(err, memflash.ErrPowerOff)
}

// errRefused stands for an error that came as text.
var errRefused = errors.New("refused by the server")

// do performs an operation that the model expects to be want. Whatever it was
// refused or interrupted with, the state must then be one that it passes
// through.
func (m *Machine) do(name string, want Step, op func() error) error {
	if _, busy := m.Pushing(); busy {
		want = Step{Err: ota.ErrBusy}
	}
	m.stats.Ops++
	before, pending := m.state, m.d.Chip.Pending()
	err := op()
	struck := m.d.Chip.Pending() < pending
	if struck {
		m.stats.Faults++
	}
	all := append([]State{before}, want.Steps...)
	end := want.End(before)
	switch {
	case err == nil && want.Err == nil:
		m.done(end)
		all = []State{end}
	case m.off() || struck:
		// Any of them.
	case err != nil && want.Err != nil && (want.Answers(err) || errors.Is(err, errRefused)):
		all = []State{end}
	default:
		return fmt.Errorf("%s: error %v, the model says %v\nin state %+v", name, err, want.Err, before)
	}
	if m.off() {
		m.stats.Cuts++
		err = m.boot(all)
	} else if err = m.observe(all); err == nil && !struck && m.state != before {
		m.weak = false // all copies are written anew
	}
	if err != nil {
		return fmt.Errorf("%s: %w\nafter state %+v", name, err, before)
	}
	return nil
}

// done notes a promise: the operation that led to s was acknowledged.
func (m *Machine) done(s State) {
	switch {
	case s.Trial == 0 || s == m.state:
	case s.Outcome == ota.OutcomeCommitted:
		m.stats.Commits++
		m.floor = max(m.floor, s.Slots[s.Active].Security)
	case s.Outcome == ota.OutcomeReverted:
		m.dead[s.Trial] = true
	}
}

// observe requires that the device is in one of the given states.
func (m *Machine) observe(possible []State) error {
	s, err := m.dev.BootState(context.Background())
	if err != nil {
		return err
	}
	stored, err := m.d.Record.Load(context.Background())
	switch {
	case errors.Is(err, ota.ErrNoBootState) && m.state.Trial == 0:
	case err != nil:
		return err
	case !stored.Equal(s):
		return fmt.Errorf("%+v is stored, the device says %+v", stored, s)
	}
	got, err := m.view(s)
	if err != nil {
		return err
	}
	if !slices.Contains(possible, got) {
		return fmt.Errorf("state %+v\nthe model allows %+v", got, possible)
	}
	if st := m.dev.Status(); !st.State.Equal(s) || st.Trial != got.OnTrial() || st.Running != got.Running ||
		st.RebootPending != (got.Active != got.Running || !got.Committed && !got.Booted) {
		return fmt.Errorf("status %+v in state %+v", st, got)
	}
	if got.Floor < m.floor || got.Floor < m.state.Floor {
		return fmt.Errorf("the security floor fell to %d", got.Floor)
	}
	if n := s.Trial; n != (ota.TrialID{}) && !slices.Contains(m.ids, n) {
		m.ids = append(m.ids, n)
	}
	m.state = got
	if err := m.wrote.Load(); err != nil {
		return *err
	}
	return nil
}

// view returns a boot state as a state of the model.
func (m *Machine) view(s ota.BootState) (State, error) {
	v, err := View(s, m.dev.Running())
	if s.Trial != (ota.TrialID{}) {
		if v.Trial = slices.Index(m.ids, s.Trial) + 1; v.Trial == 0 {
			v.Trial = len(m.ids) + 1
		}
	}
	return v, err
}

// boot boots the device, which is in one of the given states, until it runs.
func (m *Machine) boot(possible []State) error {
	m.hangUp()
	for {
		m.dev, m.now = nil, 0
		m.stats.Boots++
		pending := m.d.Chip.Pending()
		o := &ota.Options{
			Platform: "sim", Product: "demo", Tries: m.tries, BufferSize: 1 << 10,
			BootClock: func() (time.Duration, error) { return m.now, nil },
			Reset:     func(context.Context) error { m.resets.Add(1); return nil },
			OnEvent: func(e ota.Event) {
				if e.Op == "commit" && e.Phase == ota.PhaseFailed && m.giveUp != nil {
					m.giveUp()
				}
			},
		}
		dev, h, err := m.d.Boot(context.Background(), o)
		var stored, runs []State
		dead := false
		for _, s := range possible {
			steps, ok := s.Boot(m.Env())
			stored = append(append(stored, s), steps...)
			if ok {
				runs = append(runs, steps[len(steps)-1])
			} else {
				dead = true
			}
		}
		switch {
		case m.off():
			m.stats.Cuts++
			possible = compact(stored)
			continue
		case dead && errors.Is(err, ota.ErrNotBootable):
			if len(m.marks) == 0 {
				return fmt.Errorf("no slot can be booted, yet none was damaged: %w", err)
			}
			m.repair()
			possible = compact(stored)
			continue
		case err != nil:
			return fmt.Errorf("boot: %w\nfrom %+v", err, possible)
		}
		if m.d.Chip.Pending() < pending {
			m.stats.Faults++
		}
		m.dev = dev
		if err := m.observe(runs); err != nil {
			return fmt.Errorf("boot: %w", err)
		}
		return m.handedOver(h)
	}
}

// compact returns s without repetitions.
func compact(s []State) (t []State) {
	for _, v := range s {
		if !slices.Contains(t, v) {
			t = append(t, v)
		}
	}
	return t
}

// handedOver holds a handover against what was promised.
func (m *Machine) handedOver(h ota.Handover) error {
	s := m.state
	f := s.Slots[h.Slot]
	switch {
	case h.Slot != s.Running:
		return fmt.Errorf("slot %v was started, slot %v runs", h.Slot, s.Running)
	case m.d.Identify(h.Slot) == 0:
		return fmt.Errorf("slot %v was started and is not complete", h.Slot)
	case h.Verified != (f.Version != 0):
		return fmt.Errorf("slot %v: Verified is %t", h.Slot, h.Verified)
	case h.FirstBoot != (!s.Committed && s.Tries == m.tries-1):
		return fmt.Errorf("FirstBoot is %t with %d boots left", h.FirstBoot, s.Tries)
	case f.Security < s.Floor && s.Committed:
		return fmt.Errorf("security version %d was started, the floor is %d", f.Security, s.Floor)
	case s.Committed && f.Version != 0 && !f.Approved:
		return fmt.Errorf("slot %v was started as committed and never was", h.Slot)
	case s.Committed:
		return nil
	}
	m.runs[s.Trial]++
	switch {
	case m.dead[s.Trial]:
		return fmt.Errorf("trial %d runs after it was over", s.Trial)
	case m.runs[s.Trial] > m.tries:
		return fmt.Errorf("boot %d of trial %d", m.runs[s.Trial], s.Trial)
	}
	return nil
}

// Image is a firmware image, good or bad.
type Image struct {
	Version  int // 2 to sim.Versions
	Security uint64
	Fault    ImageFault
}

// ImageFault is what is wrong with an image.
type ImageFault uint8

// The faults of images.
const (
	Good ImageFault = iota
	Unsigned
	OtherPlatform
	OtherProduct
	TooLarge
	WrongDigest
	Short
	Long
	imageFaults
)

// ImageFaults is the number of faults, Good included.
const ImageFaults = int(imageFaults)

// Content returns the image as the model sees it.
func (i Image) Content() Content {
	c := Content{Firmware: Firmware{Version: i.Version, Security: i.Security}}
	switch i.Fault {
	case Unsigned:
		c.Refused = ota.ErrUnverified
	case OtherPlatform:
		c.Refused = ota.ErrPlatform
	case OtherProduct:
		c.Refused = ota.ErrProduct
	case TooLarge:
		c.NoRoom = ota.ErrTooLarge
	case WrongDigest:
		c.Corrupt, c.Broken = true, ota.ErrDigest
	case Short:
		c.Broken = ota.ErrTooSmall
	case Long:
		c.Broken = ota.ErrTooLarge
	}
	return c
}

// Open returns the image.
func (i Image) Open() ota.Image {
	return &sim.Image{
		V: i.Version,
		Mutate: func(info *ota.ImageInfo) {
			info.Security = i.Security
			switch i.Fault {
			case Unsigned:
				info.SignedBy = nil
			case OtherPlatform:
				info.Platform = "sim2"
			case OtherProduct:
				info.Name = "Demo"
			case TooLarge:
				info.Parts[1].Size = 1 << 40
			case WrongDigest:
				for k := range info.Parts {
					sum := *info.Parts[k].SHA256
					sum[31] ^= 1
					info.Parts[k].SHA256 = &sum
				}
			}
		},
		Wrap: func(_ string, r io.Reader) io.Reader {
			switch i.Fault {
			case Short:
				return io.LimitReader(r, 1000)
			case Long:
				return io.MultiReader(r, bytes.NewReader([]byte{0}))
			}
			return r
		},
	}
}

// Update installs an image.
func (m *Machine) Update(i Image, timeout time.Duration, ignoreSame bool) error {
	m.stats.Updates++
	want := m.state.Do(m.Env(), Op{Kind: Update, Content: i.Content(), Timeout: timeout, IgnoreSame: ignoreSame})
	return m.do("update", want, func() error {
		res, err := m.dev.Update(context.Background(), i.Open(), &ota.UpdateOptions{CommitTimeout: timeout, IgnoreSameVersion: ignoreSame})
		if err == nil && want.Err == nil {
			if end := want.End(m.state); res.Same != (end == m.state) || !res.Same && res.Slot != end.Active {
				return fmt.Errorf("result %+v", res)
			}
		}
		return err
	})
}

// Commit commits with Device.Commit, or CommitTrial if trial is not 0; a number
// that was not issued stands for a foreign one.
func (m *Machine) Commit(trial int) error {
	return m.do("commit", m.state.Do(m.Env(), Op{Kind: Commit, Trial: trial}), func() error {
		if trial == 0 {
			return m.dev.Commit(context.Background())
		}
		id := ota.TrialID{0xff}
		if trial > 0 && trial <= len(m.ids) {
			id = m.ids[trial-1]
		}
		return m.dev.CommitTrial(context.Background(), id)
	})
}

// Revert calls Device.Revert.
func (m *Machine) Revert() error {
	return m.do("revert", m.state.Do(m.Env(), Op{Kind: Revert, Reason: ota.ReasonRequested}), func() error { return m.dev.Revert(context.Background()) })
}

// Snapshot calls Device.CreateSnapshot.
func (m *Machine) Snapshot(setAsRevert bool, timeout time.Duration) error {
	return m.do("snapshot", m.state.Do(m.Env(), Op{Kind: Snapshot, SetAsRevert: setAsRevert, Timeout: timeout}), func() error {
		_, err := m.dev.CreateSnapshot(context.Background(), &ota.SnapshotOptions{SetAsRevert: setAsRevert, CommitTimeout: timeout})
		return err
	})
}

// SetBootState calls Device.SetBootState.
func (m *Machine) SetBootState(p ota.BootStatePatch) error {
	return m.do("set boot state", m.state.Do(m.Env(), Op{Kind: SetBootState, Patch: p}), func() error {
		return m.dev.SetBootState(context.Background(), p)
	})
}

// Wait lets the boot clock run on.
func (m *Machine) Wait(d time.Duration) { m.now += d }

// Watch calls Device.Watch, which must be about to decide (State.Expired). It
// reboots if Watch does.
func (m *Machine) Watch() error {
	resets := m.resets.Load()
	want := m.state.Watch(m.Env())
	if _, busy := m.Pushing(); busy {
		return nil // Watch would return at once: a push needs a committed firmware
	}
	trial := m.state.Trial
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	m.giveUp = cancel
	err := m.do("watch", want, func() error { return m.dev.Watch(ctx) })
	m.giveUp = nil
	if err != nil || m.resets.Load() == resets {
		return err
	}
	if m.state.Trial == trial && m.state.Outcome == ota.OutcomeReverted {
		m.dead[trial] = true
	}
	return m.Reboot(true, 0, 0)
}

// Reboot restarts the device. Without soft the power is taken away; seed decides
// about what was not synced.
func (m *Machine) Reboot(soft bool, loss memflash.Loss, seed uint64) error {
	possible := []State{m.state}
	if p := m.push; p != nil {
		possible = append(possible, p.want.Steps...)
	}
	if !soft {
		m.d.Chip.PowerOff(loss, seed)
	}
	m.hangUp()
	if err := m.boot(possible); err != nil {
		return fmt.Errorf("reboot: %w", err)
	}
	if m.stored() && !soft && !m.weak && !m.Planned() {
		m.spare = true // Heal has rewritten what was damaged
	}
	return nil
}

// Cut plans a power cut at the operation of the flash that comes n after the
// next one. It reports whether it does: a cut that leaves weak bits counts as
// damage to the record.
func (m *Machine) Cut(n int, mode int, seed uint64) bool {
	f := memflash.TearModes(seed)[mode]
	if m.Planned() || m.push != nil || f.Kind == memflash.CutWeak && (!m.stored() || !m.harm(true)) {
		return false
	}
	f.At = m.d.Chip.Ops() + n
	m.d.Chip.Plan(f)
	return true
}

// Fault plans that an operation fails, or that a write or erase does nothing and
// says nothing.
func (m *Machine) Fault(n int, skip bool, seed uint64) bool {
	if m.Planned() || m.push != nil || !m.harm(false) {
		return false
	}
	f := memflash.Fault{Kind: memflash.Fail, At: m.d.Chip.Ops() + n, Seed: seed, N: int64(seed % 300)}
	if skip {
		f.Kind, f.On = memflash.Skip, memflash.OpWrite|memflash.OpErase
	}
	m.d.Chip.Plan(f)
	return true
}

// harm takes the one damage that the record can stand.
func (m *Machine) harm(weak bool) bool {
	if !m.spare {
		return false
	}
	m.spare, m.weak = false, weak
	return true
}

// Damage is a way in which a copy of the record is damaged.
type Damage uint8

// The damages.
const (
	FlipBit Damage = iota
	WeakBit        // a bit that reads as either value
	Blank          // erased
	Noise
	damages
)

// Damages is their number.
const Damages = int(damages)

// stored reports whether there is a record yet. The guarantee of package
// bootrecord is about what was stored once.
func (m *Machine) stored() bool { return m.state.Slots[m.state.Running].Version != 0 }

// HarmRecord damages a copy of the record, if none is damaged.
func (m *Machine) HarmRecord(copy int, how Damage, off int64, bit uint) (done bool, err error) {
	fs := m.d.Chip.Flashes()
	i := 2*len(m.d.Slots) + copy
	if m.push != nil || m.Planned() || i >= len(fs) || !m.stored() || !m.harm(how == WeakBit) {
		return false, nil
	}
	off %= 256
	switch how {
	case FlipBit:
		err = m.d.Chip.FlipBit(i, off, bit)
	case WeakBit:
		err = m.d.Chip.WeakBit(i, off, bit)
	case Blank, Noise:
		b := bytes.Repeat([]byte{ota.ErasedByte(fs[i])}, int(fs[i].Size()))
		if how == Noise {
			for k := range b {
				b[k] = byte(sim.Seed(int(off), k/8) >> (k % 8 * 8))
			}
		}
		err = m.d.Chip.Poke(i, b, 0)
	}
	return true, err
}

// HarmSlot flips a bit of a slot that is known to hold an image. When no slot
// can be booted any more, the machine flips such bits back.
func (m *Machine) HarmSlot(id ota.SlotID, off int64, bit uint) (done bool, err error) {
	v := m.state.Slots[id].Version
	if m.push != nil || v == 0 || m.d.Identify(id) != v {
		return false, nil
	}
	k := mark{id, v, off % 1000, bit}
	m.marks = append(m.marks, k)
	return true, m.d.Chip.FlipBit(2*int(id), k.off, bit)
}

// repair restores the slots that were damaged and not written since.
func (m *Machine) repair() {
	m.stats.Repairs++
	for _, k := range slices.Backward(m.marks) {
		if m.d.Identify(k.slot) != 0 {
			continue
		}
		// It is off the chip's limits if any of these fails.
		_ = m.d.Chip.FlipBit(2*int(k.slot), k.off, k.bit)
		if m.d.Identify(k.slot) != k.version {
			_ = m.d.Chip.FlipBit(2*int(k.slot), k.off, k.bit)
		}
	}
	m.marks = nil
}

// push is a session of OTA.Begin, OTA.Write and OTA.End.
type push struct {
	zip  []byte
	head int // bytes up to some data of the first part
	off  int // bytes sent
	last int // offset of the last write
	want Step
	args string
}

// Bundle returns the image, which must be Good or WrongDigest, as an unsigned
// bundle.
func (i Image) Bundle() ([]byte, error) {
	info := i.Open().Info()
	mf := &bundle.Manifest{Name: info.Name, Platform: info.Platform, Version: info.Version, BuildID: info.BuildID, Security: info.Security}
	files := map[string]bundle.File{}
	for _, p := range info.Parts {
		mf.Parts = append(mf.Parts, bundle.Part{Name: p.Name, Type: p.Name, Src: p.Name + ".bin"})
		files[p.Name+".bin"] = bytes.NewReader(sim.Content(i.Version, p.Name))
	}
	var buf bytes.Buffer
	if err := bundle.Write(context.Background(), &buf, mf, files, nil); err != nil {
		return nil, err
	}
	b := buf.Bytes()
	if i.Fault == WrongDigest {
		b[bytes.Index(b, sim.Content(i.Version, "fs"))+7] ^= 1
	}
	return b, nil
}

func (m *Machine) serve() error {
	policy := &bundle.Policy{AllowUnsigned: true}
	srv, err := rpcjson.New(m.dev, rpcjson.Options{ID: "sim", NoAuth: true, Open: policy.Image})
	m.srv = srv
	return err
}

// hangUp ends the push session and the server.
func (m *Machine) hangUp() {
	if m.srv != nil {
		m.srv.Close()
		m.srv, m.push = nil, nil
	}
}

// call calls a method of the server.
func (m *Machine) call(method, params string) error {
	b, err := m.srv.Call(context.Background(), rpcjson.Peer{Channel: "loopback"}, fmt.Appendf(nil, `{"id":1,"method":%q,"params":%s}`, method, params))
	if err != nil {
		return err
	}
	var reply struct{ Error json.RawMessage }
	if err := json.Unmarshal(b, &reply); err != nil {
		return fmt.Errorf("%w: %q", err, b)
	}
	if reply.Error != nil {
		return fmt.Errorf("%w: %s: %s", errRefused, method, reply.Error)
	}
	return nil
}

func (p *push) write(off, end int) string {
	return fmt.Sprintf(`{"offset":%d,"data":%q}`, off, base64.StdEncoding.EncodeToString(p.zip[off:end]))
}

// newPush prepares a session.
func (m *Machine) newPush(i Image, timeout time.Duration) (*push, error) {
	if i.Fault != Good {
		i.Fault = WrongDigest
	}
	zip, err := i.Bundle()
	if err != nil {
		return nil, err
	}
	p := &push{zip: zip, args: fmt.Sprintf(`{"commit_timeout":%d,"size":%d}`, timeout/time.Second, len(zip))}
	p.head = bytes.Index(zip, sim.Content(i.Version, "app")[:64]) + 512
	c := Content{Firmware: i.Content().Firmware}
	if i.Fault != Good {
		// The bytes of part fs are not those of its checksums, which the reader
		// of the bundle finds out even if they are not needed.
		c.Broken = errRefused
	}
	p.want = m.state.Do(m.Env(), Op{Kind: Update, Content: c, Timeout: timeout})
	if p.want.Err == nil && c.Broken != nil {
		p.want = Step{Err: errRefused}
	}
	return p, nil
}

// Push pushes an image, in chunks of n bytes, the last one of each of them sent
// twice.
func (m *Machine) Push(i Image, timeout time.Duration, n int) error {
	m.stats.Updates++
	p, err := m.newPush(i, timeout)
	if err != nil {
		return err
	}
	if err := m.serve(); err != nil {
		return err
	}
	err = m.do("push", p.want, func() error {
		defer m.hangUp()
		if err := m.call("OTA.Begin", p.args); err != nil {
			return err
		}
		for off := 0; off < len(p.zip); off += n {
			args := p.write(off, min(off+n, len(p.zip)))
			for range 1 + off/n%2 {
				if err := m.call("OTA.Write", args); err != nil {
					return err
				}
			}
		}
		return m.call("OTA.End", "{}")
	})
	return err
}

// PushBegin begins a session, which may then be interrupted by other operations.
func (m *Machine) PushBegin(i Image, timeout time.Duration) error {
	p, err := m.newPush(i, timeout)
	if err != nil {
		return err
	}
	if err := m.serve(); err != nil {
		return err
	}
	refused := m.state.idle()
	err = m.do("push begin", Step{Err: refused}, func() error { return m.call("OTA.Begin", p.args) })
	if m.push = p; refused != nil || err != nil {
		m.hangUp()
	}
	return err
}

// PushWrite sends the next n bytes, or more if it is the first time; again
// repeats the last ones first, and ahead sends what is not due yet.
func (m *Machine) PushWrite(n int, again, ahead bool) error {
	p := m.push
	if p.off == 0 {
		n = max(n, p.head)
	}
	end := min(p.off+n, len(p.zip))
	if again && p.off > 0 {
		if err := m.call("OTA.Write", p.write(p.last, p.off)); err != nil {
			return fmt.Errorf("repeated write: %w", err)
		}
	}
	if ahead {
		if err := m.call("OTA.Write", fmt.Sprintf(`{"offset":%d,"data":"AAAA"}`, len(p.zip)+1)); !errors.Is(err, errRefused) {
			return fmt.Errorf("write at a wrong offset: %v", err)
		}
	}
	if end == p.off {
		return nil
	}
	err := m.call("OTA.Write", p.write(p.off, end))
	p.last, p.off = p.off, end
	switch {
	case err == nil && m.dev.Status().Busy == "update":
		// Going on; the slot to be written may be forgotten by now.
		return m.observe(append([]State{m.state}, p.want.Steps...))
	case err != nil && !errors.Is(err, errRefused), p.want.Err == nil:
		return fmt.Errorf("push write: %v\nin state %+v", err, m.state)
	}
	return m.endPush()
}

// endPush ends a session that has failed.
func (m *Machine) endPush() error {
	p := m.push
	err := m.call("OTA.End", "{}")
	if !errors.Is(err, errRefused) {
		return fmt.Errorf("end of a failed push: %v", err)
	}
	m.hangUp()
	return m.observe([]State{p.want.End(m.state)})
}

// PushEnd ends the session, complete or not.
func (m *Machine) PushEnd() error {
	m.stats.Updates++
	p := m.push
	want := p.want
	if p.off < len(p.zip) {
		want.Err = errRefused
		if n := len(want.Steps); n > 0 && p.want.Err == nil {
			want.Steps = want.Steps[:n-1]
		}
		if p.off == 0 {
			want.Steps = nil
		}
	}
	m.push = nil // no longer in the way
	return m.do("push end", want, func() error {
		defer m.hangUp()
		return m.call("OTA.End", "{}")
	})
}

// Settle takes a machine to rest: all faults are called off, and at most two
// boots (one more for each boot that a trial has beyond the first) must lead to
// a committed firmware, which must be updatable.
func (m *Machine) Settle() error {
	m.d.Chip.Plan()
	for range m.tries + 1 {
		if err := m.Reboot(false, memflash.LoseAll, 1); err != nil {
			return err
		}
	}
	if err := m.state.idle(); err != nil {
		return fmt.Errorf("after %d boots: %w in state %+v", m.tries+1, err, m.state)
	}
	i := Image{Version: 2 + (m.state.Slots[m.state.Running].Version-1)%(sim.Versions-1), Security: m.state.Floor}
	if err := m.Update(i, 0, false); err != nil {
		return err
	}
	if err := m.Reboot(true, 0, 0); err != nil {
		return err
	}
	if err := m.Commit(0); err != nil {
		return err
	}
	if err := m.Reboot(false, memflash.LoseAll, 1); err != nil {
		return err
	}
	if s := m.state; !s.Committed || m.d.Identify(s.Running) != i.Version {
		return fmt.Errorf("image %d was installed and committed, not this: %+v", i.Version, s)
	}
	return nil
}
