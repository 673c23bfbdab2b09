package efi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

const (
	bootOrder   = "BootOrder-" + Global
	bootNext    = "BootNext-" + Global
	bootCurrent = "BootCurrent-" + Global
)

// option returns the name of the variable that holds boot option n.
func option(n uint16) string { return fmt.Sprintf("Boot%04X-%s", n, Global) }

// parseOption is the inverse of option.
func parseOption(name string) (n uint16, ok bool) {
	digits, vendor, _ := strings.Cut(strings.TrimPrefix(name, "Boot"), "-")
	v, err := strconv.ParseUint(digits, 16, 16)
	return uint16(v), err == nil && len(digits) == 4 && strings.EqualFold(vendor, Global) && strings.HasPrefix(name, "Boot")
}

// Slot describes the boot option of a slot.
type Slot struct {
	// Description names the option, among all of the machine: "Acme A". An
	// option that has it is that of the slot.
	Description string
	// Partition and File say which program to start: \EFI\acme\a.efi.
	Partition HardDrive
	// File is empty if an option is there already and must not be touched.
	File string
	// Cmdline is handed to the program. It is empty for a program that brings
	// its own.
	Cmdline string
}

// load returns the option that starts s.
func (s *Slot) load() *LoadOption {
	o := &LoadOption{Attributes: Active, Description: s.Description, Path: []Node{s.Partition.Node(), FileNode(s.File)}}
	if s.Cmdline != "" {
		o.Optional = EncodeString(s.Cmdline)
	}
	return o
}

// Config configures a [Driver].
type Config struct {
	Slots []Slot
	// Vars are the variables of the machine; nil means efivarfs where Linux
	// has it.
	Vars Vars
	// Running finds the slot that runs. nil means that BootCurrent tells; it
	// does not if another loader stands between firmware and kernel.
	Running func(context.Context) (ota.SlotID, error)
}

// Driver drives UEFI firmware; it implements [driver.Driver].
type Driver struct {
	c Config

	mu      sync.Mutex
	running ota.SlotID // as BootCurrent told, or NoSlot
}

// New returns a driver. Slots differ in their descriptions.
func New(c *Config) (*Driver, error) {
	d := &Driver{running: ota.NoSlot}
	if c != nil {
		d.c = *c
	}
	d.c.Slots = slices.Clone(d.c.Slots)
	if d.c.Vars == nil {
		d.c.Vars = Efivarfs{}
	}
	if len(d.c.Slots) < 2 || len(d.c.Slots) > ota.MaxSlots {
		return nil, fmt.Errorf("efi: %d slots: %w", len(d.c.Slots), ota.ErrInvalid)
	}
	for i := range d.c.Slots {
		s := &d.c.Slots[i]
		b, err := s.load().Bytes()
		if err != nil {
			return nil, err
		}
		o, err := ParseLoadOption(b)
		if err != nil || s.Description == "" || o.Description != s.Description || d.slot(s.Description) != ota.SlotID(i) {
			return nil, fmt.Errorf("efi: slot %d: description %s: %w", i, ota.Quote(s.Description), ota.ErrInvalid)
		}
		if s.File != "" && s.Partition.Number == 0 {
			return nil, fmt.Errorf("efi: slot %d: file %s on no partition: %w", i, ota.Quote(s.File), ota.ErrInvalid)
		}
	}
	return d, nil
}

// slot returns the slot whose option has a description.
func (d *Driver) slot(description string) ota.SlotID {
	return ota.SlotID(slices.IndexFunc(d.c.Slots, func(s Slot) bool { return s.Description == description }))
}

// Capabilities implements [driver.Capable].
func (d *Driver) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "UEFI firmware", MaxTries: 1,
		OnPanic: driver.IfReset, OnHang: driver.Watchdog, OnUnloadable: driver.Yes,
		Note: "The firmware arms no watchdog.",
	}
}

// Running implements [driver.Driver].
func (d *Driver) Running(ctx context.Context) (ota.SlotID, error) {
	if d.c.Running != nil {
		return d.c.Running(ctx)
	}
	if err := ctx.Err(); err != nil {
		return ota.NoSlot, err
	}
	d.mu.Lock()
	known := d.running
	d.mu.Unlock()
	if known != ota.NoSlot {
		return known, nil
	}
	n, ok, err := d.number(bootCurrent)
	if err != nil {
		return ota.NoSlot, err
	}
	if !ok {
		return ota.NoSlot, fmt.Errorf("efi: the firmware does not say what it has started: %w", ota.ErrUnknownSlot)
	}
	o, err := d.option(n)
	if err != nil {
		return ota.NoSlot, err
	}
	id := ota.NoSlot
	description := "missing"
	if o != nil {
		id, description = d.slot(o.Description), ota.Quote(o.Description)
	}
	if id == ota.NoSlot {
		return id, fmt.Errorf("efi: Boot%04X was started, which is %s: %w", n, description, ota.ErrUnknownSlot)
	}
	d.mu.Lock()
	d.running = id // the option may be renumbered until the next boot
	d.mu.Unlock()
	return id, nil
}

// get returns the content of a variable; ok is false if there is none.
func (d *Driver) get(name string) (b []byte, ok bool, err error) {
	_, b, err = d.c.Vars.Get(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	return b, err == nil, err
}

// number returns a variable that names a boot option.
func (d *Driver) number(name string) (n uint16, ok bool, err error) {
	b, ok, err := d.get(name)
	if err != nil || !ok {
		return 0, false, err
	}
	if len(b) != 2 {
		return 0, false, fmt.Errorf("efi: variable %s of %d bytes: %w", name, len(b), ErrFormat)
	}
	return le.Uint16(b), true, nil
}

// option returns boot option n, nil if there is none that can be understood.
func (d *Driver) option(n uint16) (*LoadOption, error) {
	b, ok, err := d.get(option(n))
	if err != nil || !ok {
		return nil, err
	}
	o, err := ParseLoadOption(b)
	if err != nil {
		return nil, nil // the firmware passes over it, too
	}
	return o, nil
}

// state is what the variables say.
type state struct {
	order   []uint16
	next    uint16
	hasNext bool
	slots   map[uint16]ota.SlotID // the options that are of slots
	active  map[uint16]bool       // those of them that the firmware may start
	used    map[uint16]bool       // all options
}

func (d *Driver) load(ctx context.Context) (*state, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	names, err := d.c.Vars.List()
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	s := &state{slots: map[uint16]ota.SlotID{}, active: map[uint16]bool{}, used: map[uint16]bool{}}
	for _, name := range names {
		n, ok := parseOption(name)
		if !ok {
			continue
		}
		s.used[n] = true
		o, err := d.option(n)
		if err != nil {
			return nil, err
		}
		if o == nil {
			continue
		}
		if id := d.slot(o.Description); id != ota.NoSlot {
			s.slots[n], s.active[n] = id, o.Attributes&Active != 0
		}
	}
	b, _, err := d.get(bootOrder)
	if err == nil && len(b)%2 != 0 {
		err = fmt.Errorf("efi: variable %s of %d bytes: %w", bootOrder, len(b), ErrFormat)
	}
	if err != nil {
		return nil, err
	}
	for ; len(b) > 0; b = b[2:] {
		s.order = append(s.order, le.Uint16(b))
	}
	s.next, s.hasNext, err = d.number(bootNext)
	return s, err
}

// first returns the slot that is started without BootNext.
func (s *state) first() ota.SlotID {
	for _, n := range s.order {
		if id, ok := s.slots[n]; ok && s.active[n] {
			return id
		}
	}
	return ota.NoSlot
}

// pending returns the slot that BootNext names, if there is one and it is a slot.
func (s *state) pending() ota.SlotID {
	if id, ok := s.slots[s.next]; ok && s.hasNext {
		return id
	}
	return ota.NoSlot
}

// Read implements [driver.Driver].
func (d *Driver) Read(ctx context.Context) (driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	s, err := d.load(ctx)
	if err != nil {
		return c, err
	}
	c.Active = s.first()
	if c.Active == ota.NoSlot {
		return c, fmt.Errorf("efi: BootOrder names no slot: %w", ota.ErrNoBootState)
	}
	if id := s.pending(); id != ota.NoSlot && id != c.Active {
		c = driver.Choice{Active: id, Trial: true, Revert: c.Active, Tries: 1}
	}
	return c, nil
}

// Write implements [driver.Driver]. It changes two variables at most beside the
// options of slots, in an order in which the firmware acts on the old choice until
// it acts on the new one.
func (d *Driver) Write(ctx context.Context, c driver.Choice) error {
	n := ota.SlotID(len(d.c.Slots))
	if c.Active < 0 || c.Active >= n || c.Revert >= n || c.Trial && (c.Revert < 0 || c.Revert == c.Active) {
		return fmt.Errorf("efi: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	}
	if c.Tries < 0 || c.Tries > 1 || c.Trial && c.Tries == 0 && !c.Booted {
		return fmt.Errorf("efi: %d tries: %w", c.Tries, ota.ErrInvalid)
	}
	s, err := d.load(ctx)
	if err != nil {
		return err
	}
	next, first := ota.NoSlot, c.Active
	if c.Trial {
		first = c.Revert
		if c.Tries > 0 {
			next = c.Active
		}
	}
	setOrder := func() error {
		if s.first() == first && s.only(first) {
			return nil
		}
		n, err := d.ensure(s, first, false)
		if err != nil {
			return err
		}
		var b []byte
		for _, o := range s.with(n) {
			b = le.AppendUint16(b, o)
		}
		return SetVerified(d.c.Vars, bootOrder, b)
	}
	setNext := func() error {
		if next == ota.NoSlot {
			if s.pending() == ota.NoSlot {
				return nil // what others want stays
			}
			return DeleteVerified(d.c.Vars, bootNext)
		}
		n, err := d.ensure(s, next, true)
		if err != nil {
			return err
		}
		return SetVerified(d.c.Vars, bootNext, le.AppendUint16(nil, n))
	}
	steps := []func() error{setNext, setOrder}
	old := s.first()
	if old == ota.NoSlot || next == ota.NoSlot && s.pending() == first {
		// Nothing to go back to, or BootNext names the slot that is to stay.
		steps = []func() error{setOrder, setNext}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// only reports whether the order names no slot but id, and that once.
func (s *state) only(id ota.SlotID) bool {
	n := 0
	for _, o := range s.order {
		if got, ok := s.slots[o]; ok {
			if got != id {
				return false
			}
			n++
		}
	}
	return n == 1
}

// with returns the order with option n in the place of all slots. Options of others
// stay where they are.
func (s *state) with(n uint16) []uint16 {
	var order []uint16
	done := false
	for _, o := range s.order {
		if _, ok := s.slots[o]; !ok && o != n {
			order = append(order, o)
		} else if !done {
			order = append(order, n)
			done = true
		}
	}
	if !done {
		order = slices.Insert(order, 0, n)
	}
	return order
}

// ensure returns the number of the option that starts slot id, and makes one if
// there is none. An option that differs is brought up to date only if update says
// so, for one that has worked is not to be touched.
func (d *Driver) ensure(s *state, id ota.SlotID, update bool) (uint16, error) {
	var found []uint16
	for n, got := range s.slots {
		if got == id {
			found = append(found, n)
		}
	}
	slices.SortFunc(found, func(a, b uint16) int {
		// One that is in the order is known to be kept by the firmware.
		ia, ib := uint(slices.Index(s.order, a)), uint(slices.Index(s.order, b)) // -1 is last
		if ia != ib {
			if ia < ib {
				return -1
			}
			return 1
		}
		return int(a) - int(b)
	})
	slot := &d.c.Slots[id]
	if len(found) > 0 && slot.File == "" {
		if !s.active[found[0]] {
			return 0, fmt.Errorf("efi: Boot%04X, of slot %d, is not active: %w", found[0], id, ota.ErrInvalid)
		}
		return found[0], nil
	}
	if slot.File == "" {
		return 0, fmt.Errorf("efi: there is no boot option %s for slot %d, and no file to make one for: %w", ota.Quote(slot.Description), id, ota.ErrInvalid)
	}
	want, err := slot.load().Bytes()
	if err != nil {
		return 0, err
	}
	if len(found) > 0 {
		n := found[0]
		if s.active[n] && !update {
			return n, nil
		}
		return n, SetVerified(d.c.Vars, option(n), want)
	}
	for n := range 1 << 16 {
		n := uint16(n)
		if s.used[n] || slices.Contains(s.order, n) || s.hasNext && s.next == n {
			continue // nor what others still refer to
		}
		if err := SetVerified(d.c.Vars, option(n), want); err != nil {
			return 0, err
		}
		s.used[n], s.active[n], s.slots[n] = true, true, id
		return n, nil
	}
	return 0, fmt.Errorf("efi: no number is free for a boot option: %w", ota.ErrTooLarge)
}
