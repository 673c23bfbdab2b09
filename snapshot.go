package ota

import (
	"context"
	"io"
	"time"
)

// CreateSnapshot copies the running firmware, byte for byte, into a slot that
// is neither running nor selected, verifies the copy, and returns that slot.
// With SetAsRevert the running firmware is then put on trial with the snapshot
// to go back to; without it the boot state selects what it selected before.
//
// The running firmware must be committed. Parts are copied to the length that
// was installed; mutable ones, and those of a firmware that was never measured,
// whole. If a mutable part changes while it is copied the error wraps ErrChanged,
// if another one is not what was installed ErrDigest.
func (d *Device) CreateSnapshot(ctx context.Context, o *SnapshotOptions) (SlotID, error) {
	const op = "snapshot"
	if o == nil {
		o = &SnapshotOptions{}
	}
	timeout, err := commitTimeout(o.CommitTimeout)
	if err != nil {
		return NoSlot, opErr(op, NoSlot, err)
	}
	if err := d.begin(ctx, op, true); err != nil {
		return NoSlot, opErr(op, NoSlot, err)
	}
	defer d.end()
	d.start()
	d.track(nil)
	target, err := d.snapshot(ctx, o.SetAsRevert, timeout)
	err = opErr(op, target, err)
	d.finish(op, target, err)
	if err != nil {
		return NoSlot, err
	}
	return target, nil
}

func (d *Device) snapshot(ctx context.Context, setAsRevert bool, timeout time.Duration) (SlotID, error) {
	s := d.current()
	if err := d.idle(s); err != nil {
		return NoSlot, err
	}
	w := d.writer()
	next := s.Clone()
	if err := w.measure(ctx, &next); err != nil {
		return NoSlot, err
	}
	st := next.Slot(d.running)
	img := newSlotImage(d.running, &d.slots[d.running], &st)
	info := img.Info()
	target, err := d.target(s, func(id SlotID) (bool, error) { return d.holds(s, id, &info) })
	if err != nil {
		return NoSlot, err
	}
	if len(d.slots[target].Parts) != len(img.slot.Parts) {
		return target, ErrIncomplete // a part would be missing from the copy
	}
	w.id = target
	if st.Parts, err = w.fill(ctx, img, &info, &next); err != nil {
		return target, err
	}
	// The slots have the same parts, if not in the same order.
	for i, p := range d.slots[target].Parts {
		from := img.slot.Parts[img.slot.index(p.Name)]
		if !from.Mutable {
			continue
		}
		w.id, w.part = d.running, p.Name
		if sum, err := w.in.digest(ctx, from.Flash, st.Parts[i].Size); err != nil {
			return target, opErr("", d.running, inPart(p.Name, err))
		} else if sum != st.Parts[i].SHA256 {
			return target, inPart(p.Name, ErrChanged)
		}
	}
	next.setSlot(target, st)
	if setAsRevert {
		next = next.trial(d.running, target, timeout, d.o.Tries)
	}
	d.emit(Event{Phase: PhaseStoring, Slot: target})
	return target, d.store(ctx, next)
}

// slotImage is the firmware in a slot, as an image.
type slotImage struct {
	id   SlotID
	slot *Slot
	info ImageInfo
	next int
}

func newSlotImage(id SlotID, slot *Slot, st *SlotState) *slotImage {
	img := &slotImage{id: id, slot: slot}
	for i, p := range slot.Parts {
		info := PartInfo{Name: p.Name, Size: p.Flash.Size()}
		if !p.Mutable {
			info.Size, info.SHA256 = st.Parts[i].Size, &st.Parts[i].SHA256
		}
		img.info.Parts = append(img.info.Parts, info)
	}
	return img
}

func (i *slotImage) Info() ImageInfo { return i.info }

func (i *slotImage) Next(ctx context.Context) (*ImagePart, error) {
	if i.next == len(i.info.Parts) {
		return nil, io.EOF
	}
	p := i.info.Parts[i.next]
	data := io.NewSectionReader(i.slot.Parts[i.next].Flash, 0, p.Size)
	i.next++
	return &ImagePart{PartInfo: p, Data: &slotData{data, i.id}}, nil
}

// slotData reads a part of a slot. Errors say so, as the slot is not the one that is
// being written.
type slotData struct {
	*io.SectionReader
	id SlotID
}

func (d *slotData) Read(p []byte) (int, error) {
	off, _ := d.Seek(0, io.SeekCurrent)
	n, err := d.SectionReader.Read(p)
	if err != nil && err != io.EOF {
		err = &Error{Op: "read", Slot: d.id, Off: off, Err: err}
	}
	return n, err
}
