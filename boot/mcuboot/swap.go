package mcuboot

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

// SwapConfig configures a [Swap].
type SwapConfig struct {
	// Primary and Secondary are the two areas, whole.
	Primary, Secondary ota.Flash
	// ImageSize is the room for an image in either area, in whole erase units: what
	// the loader needs at the end for its trailer, and for moving sectors, depends
	// on how it was built (mcu-tools/mcuboot, docs/design.md, "Image trailer";
	// imgtool sign refuses images that are too large for it).
	ImageSize int64
	// Align is the loader's BOOT_MAX_ALIGN; 0 means 8.
	Align int
	// Image is the number of the image, at most 15, where the loader manages several.
	Image uint8
	// Running returns the slot whose image is in the primary area; see [ByDigest]. It
	// is required.
	Running func(context.Context) (ota.SlotID, error)
}

// Swap drives MCUboot in a swap mode; it implements [driver.Driver]. See the package
// documentation for what a slot is there.
type Swap struct {
	c                  SwapConfig
	primary, secondary *Trailer
}

// NewSwap returns a driver. Errors wrap [ota.ErrInvalid].
func NewSwap(c *SwapConfig) (*Swap, error) {
	if c == nil || c.Primary == nil || c.Secondary == nil || c.Running == nil || c.Image > 15 {
		return nil, fmt.Errorf("mcuboot: need two areas and a way to find which slot is in the primary one: %w", ota.ErrInvalid)
	}
	d := &Swap{c: *c}
	if d.c.Align == 0 {
		d.c.Align = 8
	}
	var err error
	if d.primary, err = NewTrailer(c.Primary, d.c.Align); err != nil {
		return nil, fmt.Errorf("primary area: %w", err)
	}
	if d.secondary, err = NewTrailer(c.Secondary, d.c.Align); err != nil {
		return nil, fmt.Errorf("secondary area: %w", err)
	}
	if c.ImageSize < HeaderSize || c.ImageSize > d.primary.Start() || c.ImageSize > d.secondary.Start() {
		return nil, fmt.Errorf("mcuboot: images of %d bytes, in areas of %d and %d: %w", c.ImageSize, c.Primary.Size(), c.Secondary.Size(), ota.ErrInvalid)
	}
	for id := range ota.SlotID(2) {
		if _, err := d.area(id, 0); err != nil {
			return nil, fmt.Errorf("mcuboot: %w", err)
		}
	}
	return d, nil
}

// Capabilities implements [driver.Capable].
func (d *Swap) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "MCUboot (swap)", MaxTries: 1,
		OnPanic: driver.IfReset, OnHang: driver.Watchdog, OnUnloadable: driver.Yes,
		Note: "The loader exchanges the images of the slots before a trial, and again to go back.",
	}
}

// Running implements [driver.Driver].
func (d *Swap) Running(ctx context.Context) (ota.SlotID, error) {
	id, err := d.c.Running(ctx)
	if err == nil && id != 0 && id != 1 {
		err = fmt.Errorf("mcuboot: slot %d: %w", id, ota.ErrUnknownSlot)
	}
	return id, err
}

// look returns the trailers, and the slot whose image is in the primary area.
func (d *Swap) look(ctx context.Context) (p, s TrailerState, running ota.SlotID, err error) {
	if p, err = d.primary.Read(ctx); err == nil {
		if s, err = d.secondary.Read(ctx); err == nil {
			running, err = d.Running(ctx)
		}
	}
	return p, s, running, err
}

// Read implements [driver.Driver]. A trial that has begun reads as the slot that the
// loader goes back to: it does that at the next reset, by itself.
func (d *Swap) Read(ctx context.Context) (driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	p, s, running, err := d.look(ctx)
	if err != nil {
		return c, err
	}
	switch NextSwap(p, s) {
	case SwapTest:
		c = driver.Choice{Active: 1 - running, Trial: true, Revert: running, Tries: 1}
	case SwapPerm, SwapRevert:
		c.Active = 1 - running
	default:
		c.Active = running
	}
	return c, nil
}

// Write implements [driver.Driver]. The error wraps [ota.ErrUnsupported] for a trial of
// the firmware that runs: the loader knows trials only of what it has swapped in.
func (d *Swap) Write(ctx context.Context, c driver.Choice) error {
	known := func(id ota.SlotID) bool { return id == 0 || id == 1 }
	switch {
	case !known(c.Active) || c.Trial && c.Revert != 1-c.Active:
		return fmt.Errorf("mcuboot: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	case c.Tries < 0 || c.Tries > 1 || c.Trial && c.Tries == 0 && !c.Booted:
		return fmt.Errorf("mcuboot: %d tries: %w", c.Tries, ota.ErrInvalid)
	case c.Trial && c.Tries == 0:
		c = driver.Choice{Active: c.Revert, Revert: ota.NoSlot} // it has been used up
	}
	p, s, running, err := d.look(ctx)
	if err != nil {
		return err
	}
	next := NextSwap(p, s)
	switch {
	case c.Trial && c.Active == running:
		return fmt.Errorf("mcuboot: slot %d runs: a trial of it: %w", running, ota.ErrUnsupported)
	case c.Active == running:
		if err = d.keep(ctx, p); err == nil && s.Magic == Set {
			err = d.secondary.Erase()
		}
	case c.Trial:
		// What the trial goes back to is good.
		if err = d.keep(ctx, p); err == nil {
			err = d.secondary.SetPending(ctx, false, d.c.Image)
		}
	case next != SwapRevert:
		err = d.secondary.SetPending(ctx, true, d.c.Image)
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

// keep confirms the image in the primary area, if the loader would go back from it.
func (d *Swap) keep(ctx context.Context, p TrailerState) error {
	if p.CopyDone != Set || p.ImageOK != Unset {
		return nil
	}
	return d.primary.Confirm(ctx)
}

// area returns where the image of a slot is, if slot running is in the primary area.
func (d *Swap) area(id, running ota.SlotID) (ota.Flash, error) {
	if id == running {
		return ota.Region(d.c.Primary, 0, d.c.ImageSize)
	}
	return ota.Region(d.c.Secondary, 0, d.c.ImageSize)
}

// Image returns where the image of a slot is until the next boot: the primary area for
// the one that runs, the secondary one for the other.
func (d *Swap) Image(ctx context.Context, id ota.SlotID) (ota.Flash, error) {
	if id != 0 && id != 1 {
		return nil, fmt.Errorf("mcuboot: slot %d: %w", id, ota.ErrUnknownSlot)
	}
	running, err := d.Running(ctx)
	if err != nil {
		return nil, err
	}
	return d.area(id, running)
}

// ByDigest returns a function for SwapConfig.Running, which finds out which slot is in
// the primary area by what is in both: it compares them with the digests that records
// have of the slots, each of one part. They are the two that [driver.New] is given,
// "current" first. A slot of which nothing is known is the factory's; on a new device
// that is slot 0 in the primary area. The error wraps [ota.ErrUnknownSlot] if both slots
// are known, and in neither area is what should be there.
//
// It reads the image in the primary area at the first call, and then remembers the
// answer, which does not change until the next boot. Do not use it where the loader
// decrypts images when it swaps them.
func ByDigest(c *SwapConfig, records ...ota.Bootloader) func(context.Context) (ota.SlotID, error) {
	var found atomic.Pointer[ota.SlotID]
	return func(ctx context.Context) (ota.SlotID, error) {
		if id := found.Load(); id != nil {
			return *id, nil
		}
		id, err := byDigest(ctx, c, records)
		if err == nil {
			found.Store(&id)
		}
		return id, err
	}
}

func byDigest(ctx context.Context, c *SwapConfig, records []ota.Bootloader) (ota.SlotID, error) {
	var states []ota.BootState
	for _, r := range records {
		s, err := r.Load(ctx)
		switch {
		case err == nil:
			states = append(states, s)
		case !errors.Is(err, ota.ErrNoBootState) && !errors.Is(err, ota.ErrBadBootState):
			return ota.NoSlot, err
		}
	}
	// If both slots have the same image, what is asked for is in the secondary area
	// until the loader has swapped.
	t, err := NewTrailer(c.Secondary, cmp.Or(c.Align, 8))
	if err != nil {
		return ota.NoSlot, err
	}
	asked, err := t.Read(ctx)
	if err != nil {
		return ota.NoSlot, err
	}
	factory := ota.NoSlot
	if len(states) == 0 {
		factory = 0
	}
	for i, area := range []ota.Flash{c.Primary, c.Secondary} {
		for _, s := range states {
			ids := []ota.SlotID{s.Active, 1 - s.Active}
			if asked.Magic == Set {
				slices.Reverse(ids)
			}
			for _, id := range ids {
				parts := s.Slot(id).Parts
				if len(parts) == 0 {
					if factory == ota.NoSlot {
						factory = id
					}
					continue
				}
				ok, err := holds(ctx, area, parts[0])
				switch {
				case err != nil:
					return ota.NoSlot, err
				case ok && i == 0:
					return id, nil
				case ok:
					return 1 - id, nil
				}
			}
		}
		if i == 0 && factory != ota.NoSlot {
			return factory, nil
		}
	}
	return ota.NoSlot, fmt.Errorf("mcuboot: no slot has the image in the primary area: %w", ota.ErrUnknownSlot)
}

// holds reports whether f begins with the bytes of part.
func holds(ctx context.Context, f ota.Flash, part ota.PartState) (bool, error) {
	if part.Size < 0 || part.Size > f.Size() {
		return false, nil
	}
	h := sha256.New()
	b := make([]byte, 4096)
	for r := io.NewSectionReader(f, 0, part.Size); ; {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n, err := r.Read(b)
		h.Write(b[:n])
		switch {
		case errors.Is(err, io.EOF):
			return [sha256.Size]byte(h.Sum(nil)) == part.SHA256, nil
		case err != nil:
			return false, fmt.Errorf("mcuboot: %w", err)
		}
	}
}
