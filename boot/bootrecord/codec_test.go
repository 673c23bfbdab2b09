package bootrecord

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/slotota/ota"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "rewrite testdata/*.hex")

// states returns boot states that differ in every field.
func states() map[string]ota.BootState {
	part := func(n byte) ota.PartState {
		p := ota.PartState{Size: 1<<40 + int64(n)}
		for i := range p.SHA256 {
			p.SHA256[i] = n + byte(i)
		}
		return p
	}
	full := ota.BootState{
		Active: 7, Revert: 6, Committed: true, CommitTimeout: ota.MaxCommitTimeout,
		Trial: ota.TrialID{1, 2, 3, 4, 5, 6, 7, 8}, Tries: math.MaxUint16, Booted: true, Floor: math.MaxUint64,
		Last: ota.Result{Outcome: ota.OutcomeReverted, Reason: ota.ReasonLost, Trial: ota.TrialID{9, 10},
			Slot: 5, Message: strings.Repeat("m", ota.MaxMessage)},
	}
	for i := range byte(ota.MaxSlots) {
		t := ota.SlotState{Security: uint64(i) << 60, Approved: i%2 == 0, Rejected: i%3 == 0,
			Version: strings.Repeat(string('a'+rune(i)), ota.MaxVersion), BuildID: strings.Repeat("b", ota.MaxVersion)}
		for j := range byte(ota.MaxParts) {
			t.Parts = append(t.Parts, part(i*ota.MaxParts+j))
		}
		full.Slots = append(full.Slots, t)
	}
	return map[string]ota.BootState{
		"zero":    {},
		"factory": {Committed: true, Revert: ota.NoSlot, Last: ota.Result{Slot: ota.NoSlot}},
		"trial": {
			Active: 1, Revert: 0, CommitTimeout: 300 * time.Second, Trial: ota.TrialID{0xaa, 7: 0xbb}, Tries: 1, Floor: 3,
			Slots: []ota.SlotState{
				{Parts: []ota.PartState{part(1), part(2)}, Security: 3, Version: "1.0", BuildID: "20260101", Approved: true},
				{Parts: []ota.PartState{part(3), part(4)}, Security: 4, Version: "1.1", BuildID: "20260201"},
			},
		},
		"reverted": {
			Active: 0, Revert: ota.NoSlot, Committed: true, Floor: 3,
			Slots: []ota.SlotState{
				{Parts: []ota.PartState{part(1)}, Security: 3, Version: "1.0", Approved: true},
				{Parts: []ota.PartState{part(3)}, Security: 4, Version: "1.1", Rejected: true},
			},
			Last: ota.Result{Outcome: ota.OutcomeReverted, Reason: ota.ReasonTimeout, Trial: ota.TrialID{0xaa, 7: 0xbb}, Slot: 1, Message: "too late"},
		},
		"none": {Active: ota.NoSlot, Revert: ota.NoSlot},
		"full": full,
	}
}

func TestGolden(t *testing.T) {
	for name, s := range states() {
		rec := record{minor: Minor, gen: 0x0102030405060708, missing: 0x5a, state: s}
		raw, err := rec.encode()
		require.NoError(t, err)
		file := filepath.Join("testdata", name+".hex")
		if *update {
			require.NoError(t, os.WriteFile(file, []byte(hex.Dump(raw)), 0o666))
		}
		want, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, strings.ReplaceAll(string(want), "\r\n", "\n"), hex.Dump(raw), name)

		for _, tail := range [][]byte{nil, {0xff}, bytes.Repeat([]byte{0}, 100)} {
			got, b, err := decode(append(bytes.Clone(raw), tail...))
			require.NoError(t, err)
			require.Equal(t, rec, *got)
			require.Equal(t, raw, b)
		}
	}
}

func TestMaxSize(t *testing.T) {
	rec := record{gen: 1, state: states()["full"], ext: bytes.Repeat([]byte{1}, maxExt)}
	raw, err := rec.encode()
	require.NoError(t, err)
	require.Len(t, raw, MaxSize)
	got, _, err := decode(raw)
	require.NoError(t, err)
	require.Equal(t, rec, *got)

	rec.ext = append(rec.ext, 1)
	_, err = rec.encode()
	require.ErrorIs(t, err, ota.ErrInvalid)
}

func TestEveryBitFlip(t *testing.T) {
	for name, s := range states() {
		rec := record{gen: 77, state: s}
		raw, err := rec.encode()
		require.NoError(t, err)
		for i := range raw {
			for bit := range 8 {
				raw[i] ^= 1 << bit
				if _, _, err := decode(raw); !errors.Is(err, ota.ErrBadBootState) || errors.Is(err, ErrVersion) {
					t.Fatalf("%s: bit %d of byte %d flipped: %v", name, bit, i, err)
				}
				raw[i] ^= 1 << bit
			}
		}
		for n := range raw {
			_, _, err := decode(raw[:n])
			if n == 0 {
				require.ErrorIs(t, err, errBlank)
			} else {
				require.ErrorIs(t, err, ota.ErrBadBootState, "%s: %d bytes", name, n)
			}
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, change := range map[string]func(r *record){
		"generation 0":     func(r *record) { r.gen = 0 },
		"generation 2^63":  func(r *record) { r.gen = 1 << 63 },
		"active -2":        func(r *record) { r.state.Active = -2 },
		"active 8":         func(r *record) { r.state.Active = ota.MaxSlots },
		"active 256":       func(r *record) { r.state.Active = 256 },
		"revert 8":         func(r *record) { r.state.Revert = ota.MaxSlots },
		"last slot 255":    func(r *record) { r.state.Last.Slot = 255 },
		"tries -1":         func(r *record) { r.state.Tries = -1 },
		"tries 65536":      func(r *record) { r.state.Tries = 65536 },
		"timeout < 0":      func(r *record) { r.state.CommitTimeout = -time.Second },
		"timeout max+1":    func(r *record) { r.state.CommitTimeout = ota.MaxCommitTimeout + time.Second },
		"timeout fraction": func(r *record) { r.state.CommitTimeout = 1500 * time.Millisecond },
		"outcome":          func(r *record) { r.state.Last.Outcome = ota.OutcomeReverted + 1 },
		"reason":           func(r *record) { r.state.Last.Reason = ota.ReasonLost + 1 },
		"9 slots":          func(r *record) { r.state.Slots = make([]ota.SlotState, ota.MaxSlots+1) },
		"9 parts": func(r *record) {
			r.state.Slots = []ota.SlotState{{Parts: make([]ota.PartState, ota.MaxParts+1)}}
		},
		"size < 0": func(r *record) {
			r.state.Slots = []ota.SlotState{{Parts: []ota.PartState{{Size: -1}}}}
		},
	} {
		rec := record{gen: 1, state: states()["factory"]}
		change(&rec)
		_, err := rec.encode()
		require.ErrorIs(t, err, ota.ErrInvalid, name)
	}
}

// seal gives b, a record without a checksum, its length and checksum.
func seal(b []byte) []byte {
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)+sumSize))
	return append(b, sum(b)...)
}

// body returns the encoding of a state without its checksum.
func body(t *testing.T, s ota.BootState) []byte {
	t.Helper()
	rec := record{gen: 5, state: s}
	raw, err := rec.encode()
	require.NoError(t, err)
	return raw[:len(raw)-sumSize]
}

func TestDecodeRefuses(t *testing.T) {
	trial := states()["trial"]
	slot0 := headerSize
	for name, change := range map[string]func(b []byte) []byte{
		"generation 0":    func(b []byte) []byte { clear(b[16:24]); return b },
		"generation 2^63": func(b []byte) []byte { b[23] = 0x80; return b },
		"active 8":        func(b []byte) []byte { b[24] = 8; return b },
		"active -2":       func(b []byte) []byte { b[24] = 0xfe; return b },
		"revert 127":      func(b []byte) []byte { b[25] = 127; return b },
		"last slot":       func(b []byte) []byte { b[26] = 0x80; return b },
		"flags":           func(b []byte) []byte { b[27] |= 4; return b },
		"outcome":         func(b []byte) []byte { b[28] = 3; return b },
		"reason":          func(b []byte) []byte { b[29] = 8; return b },
		"timeout":         func(b []byte) []byte { b[35] = 0xff; return b },
		"message":         func(b []byte) []byte { b[36] = ota.MaxMessage + 1; return b },
		"message length":  func(b []byte) []byte { b[36] = ota.MaxMessage; return b[:headerSize] },
		"slots":           func(b []byte) []byte { b[37] = ota.MaxSlots + 1; return b },
		"more slots":      func(b []byte) []byte { b[37] = 3; return b },
		"reserved":        func(b []byte) []byte { b[39] = 1; return b },
		"slot flags":      func(b []byte) []byte { b[slot0] |= 4; return b },
		"parts":           func(b []byte) []byte { b[slot0+1] = ota.MaxParts + 1; return b },
		"more parts":      func(b []byte) []byte { b[slot0+1] = ota.MaxParts; return b },
		"version":         func(b []byte) []byte { b[slot0+2] = ota.MaxVersion + 1; return b },
		"build id":        func(b []byte) []byte { b[slot0+3] = ota.MaxVersion + 1; return b },
		"size":            func(b []byte) []byte { b[slot0+slotSize+3+8+7] = 0x80; return b },
		"header only":     func(b []byte) []byte { return b[:headerSize] },
		"half a header":   func(b []byte) []byte { return b[:40] },
		"no header":       func(b []byte) []byte { return b[:24] },
		"extensions":      func(b []byte) []byte { return append(b, make([]byte, maxExt+1)...) },
		"magic":           func(b []byte) []byte { b[0] = 'S'; return b },
	} {
		b := seal(change(body(t, trial)))
		_, _, err := decode(b)
		require.ErrorIs(t, err, ota.ErrBadBootState, name)
	}
	for _, n := range []uint32{0, 1, 24 + sumSize - 1, MaxSize + 1, math.MaxInt32, math.MaxUint32} {
		b := append(seal(body(t, trial)), make([]byte, MaxSize)...)
		binary.LittleEndian.PutUint32(b[12:], n)
		_, _, err := decode(b)
		require.ErrorIs(t, err, ota.ErrBadBootState, "length %d", n)
	}
}

func TestVersions(t *testing.T) {
	trial := states()["trial"]
	for _, major := range []uint16{0, 2, 0x101, 0xffff} {
		b := body(t, trial)
		binary.LittleEndian.PutUint16(b[8:], major)
		// Nothing after the generation is known to be the same.
		for _, b := range [][]byte{seal(b), seal(b[:24]), seal(append(b[:24:24], 0xff, 0xee))} {
			_, _, err := decode(b)
			require.ErrorIs(t, err, ErrVersion)
			require.NotErrorIs(t, err, ota.ErrBadBootState)
			b[len(b)-1]++
			_, _, err = decode(b)
			require.ErrorIs(t, err, ota.ErrBadBootState)
			require.NotErrorIs(t, err, ErrVersion)
		}
	}
	b := append(body(t, trial), "\x01\x80\x04\x00new!"...)
	b[10], b[28], b[29] = 9, 200, 201
	rec, _, err := decode(seal(b))
	require.NoError(t, err)
	trial.Last.Outcome, trial.Last.Reason = 200, 201
	require.Equal(t, record{minor: 9, gen: 5, state: trial, ext: []byte("\x01\x80\x04\x00new!")}, *rec)
	raw, err := rec.encode()
	require.NoError(t, err)
	require.Equal(t, seal(b), raw)
}

func TestCut(t *testing.T) {
	for _, c := range []struct {
		in   string
		n    int
		want string
	}{
		{"", 4, ""},
		{"abcd", 4, "abcd"},
		{"abcde", 4, "abcd"},
		{"abc\u00e9", 4, "abc"},
		{"ab\u20ac", 4, "ab"},
		{"ab\u20acd", 5, "ab\u20ac"},
		{"\U0001f600\U0001f600", 7, "\U0001f600"},
		{"\x80\x80\x80\x80\x80\x80", 5, "\x80\x80\x80\x80\x80"},
	} {
		require.Equal(t, c.want, cut(c.in, c.n), "%q", c.in)
	}
	s := states()["trial"]
	s.Slots[0].Version = strings.Repeat("v", ota.MaxVersion-1) + "\u00e9"
	s.Slots[1].BuildID = strings.Repeat("b", 300)
	s.Last.Message = strings.Repeat("m", 1000)
	want := s.Clone()
	want.Slots[0].Version = strings.Repeat("v", ota.MaxVersion-1)
	want.Slots[1].BuildID = strings.Repeat("b", ota.MaxVersion)
	want.Last.Message = strings.Repeat("m", ota.MaxMessage)
	rec, _, err := decode(seal(body(t, s)))
	require.NoError(t, err)
	require.Equal(t, want, rec.state)
	require.Equal(t, want, fit(s))
}

func FuzzDecode(f *testing.F) {
	for _, s := range states() {
		rec := record{gen: 5, state: s}
		raw, err := rec.encode()
		require.NoError(f, err)
		f.Add(raw, false)
		f.Add(raw[:len(raw)-sumSize], true)
	}
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		// Few mutations survive the checksum, so let most of them have theirs.
		if sealed && len(b) >= 24 && len(b) <= MaxSize-sumSize {
			b = seal(b)
		}
		before := bytes.Clone(b)
		rec, raw, err := decode(b)
		require.Equal(t, before, b)
		if err != nil {
			require.Nil(t, rec)
			return
		}
		// What is accepted is canonical: it encodes to the same bytes.
		require.True(t, bytes.HasPrefix(b, raw))
		again, err := rec.encode()
		require.NoError(t, err)
		require.Equal(t, raw, again)
		require.True(t, fit(rec.state).Equal(rec.state))
	})
}
