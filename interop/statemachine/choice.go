package statemachine

import "github.com/slotota/ota"

// target returns the slot that c is written to: never the one that runs or is
// active; best where it is in place, else where nothing good is, else not the
// revert slot.
func (s State) target(e Env, c Content) ota.SlotID {
	best, most := ota.NoSlot, -1
	for i, f := range s.Slots[:e.Slots] {
		id, rank := ota.SlotID(i), 0
		switch {
		case id == s.Running || id == s.Active:
			continue
		case c.is(f):
			rank = 3
		case f.Version == 0 || f.Rejected:
			rank = 2
		case id != s.Revert:
			rank = 1
		}
		if rank > most {
			best, most = id, rank
		}
	}
	return best
}

// fallback returns the slot that is booted when the active one is damaged: one
// that was committed, was not given up since, and may still run.
func (s State) fallback(e Env) ota.SlotID {
	for i, f := range s.Slots[:e.Slots] {
		id := ota.SlotID(i)
		if id != s.Active && f.Approved && !f.Rejected && f.Security >= s.Floor && s.holds(e, id) {
			return id
		}
	}
	return ota.NoSlot
}

// holds reports whether slot id holds the firmware that s says to the last byte.
func (s State) holds(e Env, id ota.SlotID) bool {
	return s.Slots[id].Version != 0 && e.Holds(id, s.Slots[id].Version)
}

// is reports whether firmware f has the same digests.
func (c Content) is(f Firmware) bool { return f.Version == c.Version && !c.Corrupt }
