package ota

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
)

// SlotID numbers the slots of a device from 0, in the order given to [Open].
type SlotID int

// NoSlot stands for the absence of a slot.
const NoSlot SlotID = -1

// String returns the number, or "none".
func (s SlotID) String() string {
	if s == NoSlot {
		return "none"
	}
	return strconv.Itoa(int(s))
}

// Limits on what a device may be made of; they bound the boot record.
const (
	MaxSlots    = 8  // slots of a device
	MaxParts    = 8  // parts of a slot
	MaxPartName = 32 // bytes of a part's name
)

// Slot is a place for one complete firmware.
type Slot struct {
	// Parts are the regions that make up the firmware, at least one. All
	// writable slots of a device have parts of the same names.
	Parts []Part
	// ReadOnly marks a slot that is never written, such as a factory image.
	ReadOnly bool
}

// Part is a named region of a slot.
type Part struct {
	// Name is how a bundle refers to the part, such as "app" or "rootfs".
	Name string
	// Flash holds the bytes of the part.
	Flash Flash
	// Mutable says that the running firmware writes to this part: a file
	// system with settings, for example. Such a part is verified when it is
	// installed, but cannot be held against a digest at boot.
	Mutable bool
}

// index returns the position of the named part of s, or -1.
func (s *Slot) index(name string) int {
	return slices.IndexFunc(s.Parts, func(p Part) bool { return p.Name == name })
}

// checkSlots reports what is wrong with the slots of a device.
func checkSlots(slots []Slot) error {
	if len(slots) < 2 || len(slots) > MaxSlots {
		return fmt.Errorf("%d slots: need 2 to %d: %w", len(slots), MaxSlots, ErrInvalid)
	}
	var model *Slot // the first writable slot
	var seen []Flash
	for i := range slots {
		s := &slots[i]
		if len(s.Parts) == 0 || len(s.Parts) > MaxParts {
			return fmt.Errorf("slot %d: %d parts: need 1 to %d: %w", i, len(s.Parts), MaxParts, ErrInvalid)
		}
		for j, p := range s.Parts {
			switch {
			case p.Name == "" || len(p.Name) > MaxPartName:
				return fmt.Errorf("slot %d: part %d: name %s: need 1 to %d bytes: %w", i, j, Quote(p.Name), MaxPartName, ErrInvalid)
			case p.Flash == nil:
				return fmt.Errorf("slot %d: part %s: no flash: %w", i, Quote(p.Name), ErrInvalid)
			case s.index(p.Name) != j:
				return fmt.Errorf("slot %d: two parts named %s: %w", i, Quote(p.Name), ErrInvalid)
			case reflect.TypeOf(p.Flash).Comparable() && slices.Contains(seen, p.Flash):
				return fmt.Errorf("slot %d: part %s: its flash is that of another part: %w", i, Quote(p.Name), ErrInvalid)
			}
			if e, ok := p.Flash.(Eraser); ok && e.EraseSize() <= 0 {
				return fmt.Errorf("slot %d: part %s: erase size %d: %w", i, Quote(p.Name), e.EraseSize(), ErrInvalid)
			}
			if reflect.TypeOf(p.Flash).Comparable() {
				seen = append(seen, p.Flash)
			}
		}
		if s.ReadOnly {
			continue
		}
		if model == nil {
			model = s
		}
		if len(s.Parts) != len(model.Parts) {
			return fmt.Errorf("slot %d: other parts than the first writable slot: %w", i, ErrInvalid)
		}
		for _, p := range s.Parts {
			if model.index(p.Name) < 0 {
				return fmt.Errorf("slot %d: part %s is not in the first writable slot: %w", i, Quote(p.Name), ErrInvalid)
			}
		}
	}
	if model == nil {
		return fmt.Errorf("no writable slot: %w", ErrInvalid)
	}
	return nil
}
