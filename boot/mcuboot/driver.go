package mcuboot

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

// Config configures a [Driver].
type Config struct {
	// Slots are the primary and the secondary slot, whole.
	Slots [2]ota.Flash
	// Align is the loader's BOOT_MAX_ALIGN; 0 means 8.
	Align int
	// CompareBuild says that the loader was built with
	// MCUBOOT_VERSION_CMP_USE_BUILD_NUMBER.
	CompareBuild bool
	// Running finds the slot that runs, by the address of the code that
	// executes or the loader's shared data. It is required.
	Running func(context.Context) (ota.SlotID, error)
}

// Driver drives MCUboot in direct-XIP mode with revert; it implements
// [driver.Driver].
type Driver struct {
	c        Config
	trailers [2]*Trailer
}

// New returns a driver. Errors wrap [ota.ErrInvalid].
func New(c *Config) (*Driver, error) {
	if c == nil || c.Slots[0] == nil || c.Slots[1] == nil || c.Running == nil {
		return nil, fmt.Errorf("mcuboot: need two slots and a way to find the running one: %w", ota.ErrInvalid)
	}
	d := &Driver{c: *c}
	if d.c.Align == 0 {
		d.c.Align = 8
	}
	for i, f := range c.Slots {
		t, err := NewTrailer(f, d.c.Align)
		if err != nil {
			return nil, fmt.Errorf("slot %d: %w", i, err)
		}
		if t.Start() < HeaderSize {
			return nil, fmt.Errorf("mcuboot: slot %d: no room beside the trailer: %w", i, ota.ErrInvalid)
		}
		d.trailers[i] = t
	}
	return d, nil
}

// Capabilities implements [driver.Capable].
func (d *Driver) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "MCUboot", MaxTries: 1,
		OnPanic: driver.IfReset, OnHang: driver.Watchdog, OnUnloadable: driver.Yes,
		Note: "Only an image with a higher version can be tried. The loader erases the slot of a failed trial.",
	}
}

// Running implements [driver.Driver].
func (d *Driver) Running(ctx context.Context) (ota.SlotID, error) { return d.c.Running(ctx) }

// slot is what a slot holds.
type slot struct {
	header Header
	image  bool // there is a header
	t      TrailerState
}

func (d *Driver) read(ctx context.Context) (v [2]slot, err error) {
	for i := range v {
		b := make([]byte, HeaderSize)
		if n, err := d.c.Slots[i].ReadAt(b, 0); n < len(b) {
			return v, fmt.Errorf("mcuboot: slot %d: header: %w", i, errors.Join(err, io.ErrUnexpectedEOF))
		}
		v[i].header, err = ParseHeader(b)
		v[i].image = err == nil && v[i].header.Flags&FlagNonBootable == 0 && v[i].header.hashed() <= d.trailers[i].Start()
		if v[i].t, err = d.trailers[i].Read(ctx); err != nil {
			return v, fmt.Errorf("slot %d: %w", i, err)
		}
	}
	return v, nil
}

// first returns the slot that the loader looks at first.
func (d *Driver) first(v [2]slot) int {
	if v[1].image && (!v[0].image || v[1].header.Version.Compare(v[0].header.Version, d.c.CompareBuild) > 0) {
		return 1
	}
	return 0
}

// Read implements [driver.Driver].
func (d *Driver) Read(ctx context.Context) (driver.Choice, error) {
	v, err := d.read(ctx)
	if err != nil {
		return driver.Choice{}, err
	}
	return d.choice(v)
}

func (d *Driver) choice(v [2]slot) (driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	i := d.first(v)
	for _, i := range []int{i, 1 - i} {
		s := &v[i]
		switch {
		case !s.image || s.t.Magic != Set:
		case s.t.ImageOK == Set:
			if c.Trial {
				c.Revert = ota.SlotID(i)
			} else {
				c.Active = ota.SlotID(i)
			}
			return c, nil
		case c.Trial:
		case s.t.CopyDone == Unset:
			c.Active, c.Trial, c.Tries = ota.SlotID(i), true, 1
		case s.t.CopyDone == Bad || s.t.ImageOK == Unset:
			// If the power fails while the loader sets copy_done, it may start
			// the image once more. The trial has begun all the same.
			c.Active, c.Trial, c.Booted = ota.SlotID(i), true, true
		}
	}
	if c.Trial {
		return c, nil
	}
	if !v[0].image && !v[1].image && v[0].t.Magic == Unset && v[1].t.Magic == Unset {
		return c, fmt.Errorf("mcuboot: no image: %w", ota.ErrNoBootState)
	}
	return c, fmt.Errorf("mcuboot: no image that the loader would start: trailers %+v, %+v: %w", v[0].t, v[1].t, ota.ErrBadBootState)
}

// Write implements [driver.Driver]. The error wraps [ota.ErrUnsupported] if the
// loader would not choose the image because of its version.
func (d *Driver) Write(ctx context.Context, c driver.Choice) error {
	known := func(id ota.SlotID) bool { return id == 0 || id == 1 }
	switch {
	case !known(c.Active) || c.Trial && c.Revert != 1-c.Active:
		return fmt.Errorf("mcuboot: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	case c.Tries < 0 || c.Tries > 1:
		return fmt.Errorf("mcuboot: %d tries: %w", c.Tries, ota.ErrInvalid)
	}
	v, err := d.read(ctx)
	if err != nil {
		return err
	}
	x := int(c.Active)
	y := 1 - x
	switch {
	case !v[x].image || c.Trial && !v[y].image:
		return fmt.Errorf("mcuboot: slots %d and %d: no image: %w", c.Active, c.Revert, ota.ErrUnverifiedSlot)
	case c.Trial && d.first(v) != x:
		return fmt.Errorf("mcuboot: slot %d has version %v, slot %d %v, and the loader takes the higher one: %w", x, v[x].header.Version, y, v[y].header.Version, ota.ErrUnsupported)
	case c.Trial:
		if err = d.confirm(v, y); err == nil {
			err = d.try(v[x].t, x, c.Booted || c.Tries == 0)
		}
	default:
		if err = d.confirm(v, x); err == nil && d.first(v) == y && v[y].t.Magic == Set {
			err = d.refuse(v[y].t, y)
		}
	}
	if err != nil {
		return err
	}
	got, err := d.Read(context.WithoutCancel(ctx))
	if err == nil && (got.Active != c.Active || got.Trial != c.Trial) {
		err = fmt.Errorf("mcuboot: the trailers read differently from what was written: %w", ota.ErrVerify)
	}
	return err
}

// confirm makes the image in slot i one that the loader starts for good.
func (d *Driver) confirm(v [2]slot, i int) error {
	t := d.trailers[i]
	switch s := v[i].t; {
	case s.Magic == Set && s.ImageOK == Set:
		return nil
	case s.Magic == Set && s.ImageOK == Unset:
		if t.program(t.imageOK(), []byte{1}) == nil {
			return nil
		}
	}
	// Without the magic, which comes last, the loader takes the other slot.
	return t.write(0, true, true)
}

// try puts the image in slot i on trial.
func (d *Driver) try(s TrailerState, i int, booted bool) error {
	want := TrailerState{Magic: Set, SwapType: SwapNone}
	if booted {
		want.CopyDone = Set
	}
	if s == want {
		return nil
	}
	return d.trailers[i].write(0, booted, false)
}

// refuse makes the loader pass over the image in slot i.
func (d *Driver) refuse(s TrailerState, i int) error {
	switch {
	case s.CopyDone != Set || s.ImageOK == Set:
		return d.trailers[i].Erase()
	case s.ImageOK == Unset:
		// The trial that runs. To erase the trailer would give it another boot
		// if the power failed when copy_done was gone and the magic was not.
		return d.trailers[i].revoke()
	}
	return nil // as it is
}

// Image returns the part of a slot where the image goes: all but the erase units of
// the trailer. When something there is erased or written, the trailer is erased
// first: whatever it said was about another image. The error wraps
// [ota.ErrUnknownSlot].
func (d *Driver) Image(id ota.SlotID) (ota.Flash, error) {
	if id != 0 && id != 1 {
		return nil, fmt.Errorf("mcuboot: slot %d: %w", id, ota.ErrUnknownSlot)
	}
	t := d.trailers[id]
	r, err := ota.Region(d.c.Slots[id], 0, t.Start())
	if err != nil {
		return nil, err
	}
	area := imageArea{r, t}
	if e, ok := r.(ota.Eraser); ok {
		return &eraseArea{area, e}, nil
	}
	return &area, nil
}

type imageArea struct {
	ota.Flash
	t *Trailer
}

func (a *imageArea) WriteSize() int64 { return ota.WriteSize(a.Flash) }

func (a *imageArea) WriteAt(p []byte, off int64) (int, error) {
	if err := a.t.Erase(); err != nil {
		return 0, err
	}
	return a.Flash.WriteAt(p, off)
}

type eraseArea struct {
	imageArea
	e ota.Eraser
}

func (a *eraseArea) EraseSize() int64                        { return a.e.EraseSize() }
func (a *eraseArea) ErasedByte() byte                        { return ota.ErasedByte(a.Flash) }
func (a *eraseArea) EraseUnit(off int64) (start, size int64) { return ota.EraseUnit(a.Flash, off) }

func (a *eraseArea) Erase(off, n int64) error {
	if err := a.t.Erase(); err != nil {
		return err
	}
	return a.e.Erase(off, n)
}
