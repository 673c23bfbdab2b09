// Package efibootguard drives EFI Boot Guard, a loader for UEFI machines that arms
// the hardware watchdog before it starts a kernel.
//
// Each slot has a config partition (FAT) with a file BGENV.DAT: which kernel to
// start and with what arguments, a revision, a state, and the timeout of the
// watchdog. The loader starts the slot with the highest revision. If that is
// INSTALLED it becomes TESTING; if it is TESTING already it becomes FAILED, with
// revision 0, and the next one is started (efibootguard, env/fatvars.c,
// docs/UPDATE.md; the field ustate is that of SWUpdate). So a trial has one boot.
//
// # What the loader can do by itself
//
// As long as the timeout of the watchdog is not 0, and the machine has a watchdog
// that the loader knows, it goes back from anything: a panic, a hang before any user
// program runs, a kernel that cannot be loaded. It is the one loader of which that
// can be said. The watchdog runs at every boot: the kernel's driver or systemd
// (RuntimeWatchdogSec=) must take it over in time, in slots on trial and committed
// ones alike. Some the loader locks, so that nobody can stop them, and the kernel's
// driver may not know it: a 6300ESB resets the machine half a minute after its
// driver was loaded unless a program feeds it (efibootguard and torvalds/linux,
// drivers/watchdog/i6300esb.c). So ota.Options.Watchdog, if used, should not stop it
// after a commit (KeepRunning in package watchdog), and another program has to feed
// it from then on. A time longer than a boot takes, and shorter than the commit timeout,
// has the watchdog enforce the commit timeout while no program feeds it.
//
// # What must be there
//
// As many config partitions as the loader was built for, which is two, each mounted
// where [Slot] says, with room for the file twice. The command line tells the
// running system where it comes from: ota.slot=A, or what Config.Running knows.
// bg_setenv may be used beside the driver, not at the same time.
//
// The loader writes BGENV.DAT in place when a trial begins. If that is cut off the
// file is damaged and the loader takes the other one; the next install makes a new
// file if [Slot] has a kernel.
package efibootguard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/internal/fsys"
)

// Slot describes a slot.
type Slot struct {
	// File is the path of its BGENV.DAT.
	File string
	// Name is the value of the kernel parameter ota.slot if this slot runs. It
	// may be empty if Config.Running is set.
	Name string
	// Kernel and Args, if Kernel is not empty, replace what the environment
	// says at each trial of the slot, and stand in a new one if there is none
	// that can be read.
	Kernel, Args string
}

// Config configures a [Driver].
type Config struct {
	Slots []Slot
	// Watchdog, if not 0, replaces the timeout of the watchdog at each trial: it
	// is in whole seconds, at most 65535.
	Watchdog time.Duration
	// Running finds the slot that runs. nil means that the kernel parameter
	// ota.slot tells.
	Running func(context.Context) (ota.SlotID, error)

	files fsys.FS
}

// Driver drives EFI Boot Guard; it implements [driver.Driver].
type Driver struct{ c Config }

// New returns a driver.
func New(c *Config) (*Driver, error) {
	d := &Driver{}
	if c != nil {
		d.c = *c
	}
	d.c.Slots = slices.Clone(d.c.Slots)
	if d.c.files == nil {
		d.c.files = fsys.OS{}
	}
	if len(d.c.Slots) < 2 || len(d.c.Slots) > ota.MaxSlots {
		return nil, fmt.Errorf("efibootguard: %d slots: %w", len(d.c.Slots), ota.ErrInvalid)
	}
	var names []string
	for i := range d.c.Slots {
		s := &d.c.Slots[i]
		if s.File == "" || slices.IndexFunc(d.c.Slots, func(o Slot) bool { return o.File == s.File }) != i {
			return nil, fmt.Errorf("efibootguard: slot %d: file %s: %w", i, ota.Quote(s.File), ota.ErrInvalid)
		}
		if d.c.Running == nil && (s.Name == "" || slices.Contains(names, s.Name)) {
			return nil, fmt.Errorf("efibootguard: slot %d: name %s: %w", i, ota.Quote(s.Name), ota.ErrInvalid)
		}
		names = append(names, s.Name)
		if err := d.configure(ota.SlotID(i), NewEnv()); err != nil {
			return nil, err
		}
	}
	if d.c.Running == nil {
		d.c.Running = driver.RunningFromCmdline("", "ota.slot", names)
	}
	return d, nil
}

// configure puts into e what the configuration says.
func (d *Driver) configure(id ota.SlotID, e *Env) error {
	s := &d.c.Slots[id]
	if d.c.Watchdog != 0 {
		if err := e.SetWatchdog(d.c.Watchdog); err != nil {
			return err
		}
	}
	if s.Kernel == "" {
		return nil
	}
	return errors.Join(e.SetKernel(s.Kernel), e.SetArgs(s.Args))
}

// Capabilities implements [driver.Capable].
func (d *Driver) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "EFI Boot Guard", MaxTries: 1, Copies: len(d.c.Slots),
		OnPanic: driver.Yes, OnHang: driver.Yes, OnUnloadable: driver.Yes,
		Note: "So it is while the watchdog timeout of the slot is not 0 and the loader knows the machine's watchdog.",
	}
}

// Running implements [driver.Driver].
func (d *Driver) Running(ctx context.Context) (ota.SlotID, error) { return d.c.Running(ctx) }

// Watchdog returns the timeout of the watchdog that the loader arms when it starts
// slot id, 0 if it arms none.
func (d *Driver) Watchdog(ctx context.Context, id ota.SlotID) (time.Duration, error) {
	if id < 0 || int(id) >= len(d.c.Slots) {
		return 0, fmt.Errorf("efibootguard: slot %d: %w", id, ota.ErrUnknownSlot)
	}
	es, err := d.load(ctx)
	if err != nil {
		return 0, err
	}
	if es[id] == nil {
		return 0, fmt.Errorf("efibootguard: slot %d: %w", id, ErrFormat)
	}
	return es[id].Watchdog(), nil
}

// envs are the environments of the slots, nil where there is none that is sound.
type envs []*Env

func (d *Driver) load(ctx context.Context) (envs, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	es := make(envs, len(d.c.Slots))
	sound := false
	var missing, bad error
	for i, s := range d.c.Slots {
		b, err := d.c.files.ReadFile(s.File)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			missing = err
			continue
		case err != nil && !errors.Is(err, ota.ErrTooLarge):
			return nil, fmt.Errorf("efibootguard: %w", err)
		}
		if err == nil {
			es[i], err = ParseEnv(b)
		}
		if err != nil {
			bad = fmt.Errorf("%s: %w", ota.Quote(s.File), err)
		}
		sound = sound || es[i] != nil
	}
	switch {
	case sound:
		return es, nil
	case bad != nil:
		return nil, fmt.Errorf("efibootguard: %w: %w", ota.ErrBadBootState, bad)
	}
	return nil, fmt.Errorf("efibootguard: %w: %w (is the config partition mounted?)", ota.ErrNoBootState, missing)
}

// latest returns the slots with the highest and the next highest revision. It does
// what the loader does.
func (es envs) latest() (first, second ota.SlotID) {
	first, second = ota.NoSlot, ota.NoSlot
	var r1, r2 uint32
	for i, e := range es {
		if e == nil {
			continue
		}
		if r := e.Revision(); r > r1 {
			first, second, r1, r2 = ota.SlotID(i), first, r, r1
		} else if r > r2 {
			second, r2 = ota.SlotID(i), r
		}
	}
	return first, second
}

// choice returns what the loader will do.
func (es envs) choice() (driver.Choice, error) {
	first, second := es.latest()
	none := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	if first == ota.NoSlot {
		return none, fmt.Errorf("efibootguard: every revision is 0: %w", ota.ErrBadBootState)
	}
	e := es[first]
	if second == ota.NoSlot && (e.InProgress() || e.onTrial()) {
		return none, fmt.Errorf("efibootguard: slot %d is %v, in progress %v, and there is nothing else: %w", first, e.State(), e.InProgress(), ota.ErrBadBootState)
	}
	if e.onTrial() && (es[second].onTrial() || es[second].InProgress()) {
		second = ota.NoSlot // the loader starts it now, and drops it later
	}
	switch {
	case e.InProgress():
		return driver.Choice{Active: second, Revert: ota.NoSlot}, nil
	case e.State() == Installed:
		return driver.Choice{Active: first, Trial: true, Revert: second, Tries: 1}, nil
	case e.State() == Testing:
		return driver.Choice{Active: first, Trial: true, Revert: second, Booted: true}, nil
	}
	return driver.Choice{Active: first, Revert: ota.NoSlot}, nil
}

// Read implements [driver.Driver].
func (d *Driver) Read(ctx context.Context) (driver.Choice, error) {
	es, err := d.load(ctx)
	if err != nil {
		return driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}, err
	}
	return es.choice()
}

// Write implements [driver.Driver]. Each file that it replaces leaves the loader with
// the old choice or the new one. One trial in the place of another calls that one off
// first.
func (d *Driver) Write(ctx context.Context, c driver.Choice) error {
	n := ota.SlotID(len(d.c.Slots))
	if c.Active < 0 || c.Active >= n || c.Revert >= n || c.Trial && (c.Revert < 0 || c.Revert == c.Active) {
		return fmt.Errorf("efibootguard: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	}
	if c.Tries < 0 || c.Tries > 1 || c.Trial && c.Booted == (c.Tries > 0) {
		return fmt.Errorf("efibootguard: %d tries, booted %v: %w", c.Tries, c.Booted, ota.ErrInvalid)
	}
	es, err := d.load(ctx)
	if err != nil {
		return err
	}
	want := c
	if !c.Trial {
		want = driver.Choice{Active: c.Active, Revert: ota.NoSlot}
	}
	next, err := d.next(es, c)
	if err != nil {
		return err
	}
	order := es.order(next, want)
	old, _ := es.choice()
	switch {
	case order != nil:
	case old.Trial && old.Revert != ota.NoSlot && c.Trial && old.Active != c.Active:
		// The old trial has to be called off first.
		if err := d.Write(ctx, driver.Choice{Active: old.Revert, Revert: ota.NoSlot}); err != nil {
			return err
		}
		return d.Write(ctx, c)
	case !old.Trial && old.Active == c.Active && next[c.Active].Revision() > es[c.Active].Revision():
		// Room below its revision, for the slot to go back to.
		e := es[c.Active].clone()
		e.SetRevision(next[c.Active].Revision())
		if err := d.replace(c.Active, e); err != nil {
			return err
		}
		es[c.Active] = e
		order = es.order(next, want)
	}
	if order == nil {
		return fmt.Errorf("efibootguard: no order of writes is safe: %w", ota.ErrUnsupported)
	}
	for _, id := range order {
		if err := d.replace(id, next[id]); err != nil {
			return err
		}
	}
	got, err := d.load(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	for id, e := range next {
		if e != nil && (got[id] == nil || !got[id].equal(e)) {
			return fmt.Errorf("efibootguard: reading %s back: %w", ota.Quote(d.c.Slots[id].File), ota.ErrVerify)
		}
	}
	return nil
}

func (d *Driver) replace(id ota.SlotID, e *Env) error {
	if err := fsys.Replace(d.c.files, d.c.Slots[id].File, e.Bytes()); err != nil {
		return fmt.Errorf("efibootguard: %w", err)
	}
	return nil
}

// next returns the environments in which the loader does c.
func (d *Driver) next(es envs, c driver.Choice) (envs, error) {
	next := make(envs, len(es))
	for i, e := range es {
		if e != nil {
			next[i] = e.clone()
		}
	}
	for _, id := range []ota.SlotID{c.Active, c.Revert} {
		if id == ota.NoSlot || !c.Trial && id != c.Active || next[id] != nil {
			continue
		}
		if d.c.Slots[id].Kernel == "" {
			return nil, fmt.Errorf("efibootguard: slot %d has no sound environment, and no kernel to make one for: %w", id, ota.ErrInvalid)
		}
		next[id] = NewEnv()
		if err := d.configure(id, next[id]); err != nil {
			return nil, err
		}
	}
	// raise gives slot id a revision above all but those of the slots in but.
	raise := func(id ota.SlotID, but ...ota.SlotID) error {
		var top uint32
		for i, e := range next {
			if e != nil && ota.SlotID(i) != id && !slices.Contains(but, ota.SlotID(i)) {
				top = max(top, e.Revision())
			}
		}
		if top == math.MaxUint32 {
			return fmt.Errorf("efibootguard: there is no revision above %d: %w", top, ota.ErrInvalid)
		}
		if next[id].Revision() <= top {
			next[id].SetRevision(top + 1)
		}
		next[id].SetInProgress(false)
		return nil
	}
	active := next[c.Active]
	if !c.Trial {
		active.SetState(OK)
		for i, e := range next {
			// What is no longer on trial is void.
			if e != nil && ota.SlotID(i) != c.Active && e.onTrial() {
				e.SetState(Failed)
				e.SetRevision(0)
			}
		}
		return next, raise(c.Active)
	}
	next[c.Revert].SetState(OK)
	if err := raise(c.Revert, c.Active); err != nil {
		return nil, err
	}
	active.SetState(Testing)
	if c.Tries > 0 {
		active.SetState(Installed)
		if err := d.configure(c.Active, active); err != nil {
			return nil, err
		}
	}
	return next, raise(c.Active)
}

// order returns the slots whose environment changes, in an order in which the loader
// does what es or next says after each; nil if there is none.
func (es envs) order(next envs, want driver.Choice) []ota.SlotID {
	var ids []ota.SlotID
	for i, e := range next {
		if e != nil && (es[i] == nil || !e.equal(es[i])) {
			ids = append(ids, ota.SlotID(i))
		}
	}
	old, oldErr := es.choice()
	for range 2 {
		now := slices.Clone(es)
		good := true
		for _, id := range ids {
			now[id] = next[id]
			c, err := now.choice()
			good = good && (err == nil && (c == want || c == old) || err != nil && oldErr != nil)
		}
		if c, err := now.choice(); good && err == nil && c == want {
			return append([]ota.SlotID{}, ids...)
		}
		slices.Reverse(ids)
	}
	return nil
}
