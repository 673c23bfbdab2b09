package mcuboot

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/loadertest"
)

var (
	long   = flag.Bool("crash.long", false, "cut the power twice as well")
	replay = flag.String("crash.replay", "", "repeat the run of this text")
)

func read(t testing.TB, name string) []byte {
	b, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	return b
}

func keys(t testing.TB) (p256, ed crypto.PublicKey) {
	block, _ := pem.Decode(read(t, "p256.pub.pem"))
	require.NotNil(t, block)
	p256, err := x509.ParsePKIXPublicKey(block.Bytes)
	require.NoError(t, err)
	ed, err = x509.ParsePKIXPublicKey(read(t, "ed.pub"))
	require.NoError(t, err)
	return p256, ed
}

func verifyBytes(t testing.TB, b []byte, o *VerifyOptions) (*Image, error) {
	return VerifyImage(t.Context(), bytes.NewReader(b), int64(len(b)), o)
}

// TestGolden: images made by imgtool.
func TestGolden(t *testing.T) {
	p256, ed := keys(t)
	all := &VerifyOptions{Keys: []crypto.PublicKey{p256, ed}}
	for _, tc := range []struct {
		name string
		key  crypto.PublicKey
		deps bool
	}{
		{"plain.bin", nil, false}, {"p256.bin", p256, false}, {"ed25519.bin", ed, false}, {"ed25519-dep.bin", ed, true},
		{"ed25519-pad-align4.bin", ed, false}, {"ed25519-confirm-align8.bin", ed, false},
		{"ed25519-confirm-align16.bin", ed, false}, {"ed25519-confirm-align32.bin", ed, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			raw := read(t, tc.name)
			o := all
			if tc.key == nil {
				_, err := verifyBytes(t, raw, all)
				require.ErrorIs(t, err, ota.ErrUnverified)
				o = &VerifyOptions{AllowUnsigned: true}
			}
			img, err := verifyBytes(t, raw, o)
			require.NoError(t, err)
			require.Equal(t, tc.key, img.Key)
			require.Equal(t, Version{1, 2, 3, 4}, img.Header.Version)
			require.Equal(t, "1.2.3+4", img.Header.Version.String())
			require.Equal(t, uint32(5000), img.Header.ImageSize)
			require.Equal(t, raw[:HeaderSize], img.Header.Bytes())
			require.Equal(t, read(t, "app.bin"), raw[img.Header.HeaderSize:][:img.Header.ImageSize])
			if len(raw) < 30000 {
				require.Equal(t, int64(len(raw)), img.Size)
			}
			if tc.deps {
				require.Equal(t, []Dependency{{1, Version{2, 0, 0, 0}}}, img.Dependencies)
				require.True(t, img.Dependencies[0].Satisfied(Version{2, 0, 1, 0}, false))
				require.False(t, img.Dependencies[0].Satisfied(Version{1, 9, 9, 9}, false))
				require.True(t, img.Counted)
				require.Equal(t, uint32(7), img.SecurityCounter)
			}
			// Whatever bit is wrong, somebody notices.
			for i := 0; i < int(img.Size); i += 1 + i/40 {
				bad := bytes.Clone(raw)
				bad[i] ^= 0x10
				_, err := verifyBytes(t, bad, o)
				require.Error(t, err, "byte %d", i)
				require.True(t, errors.Is(err, ErrImage) || errors.Is(err, ota.ErrUnverified) || errors.Is(err, ota.ErrUnsupported), "byte %d: %v", i, err)
			}
			for i := 0; i < int(img.Size); i += 97 {
				_, err := verifyBytes(t, raw[:i], o)
				require.ErrorIs(t, err, ErrImage, "%d bytes", i)
			}
		})
	}
}

// TestSigned: images signed here, with what an attacker can add.
func TestSigned(t *testing.T) {
	pub, priv, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	other, _, err := ed25519.GenerateKey(nil)
	require.NoError(t, err)
	o := &VerifyOptions{Keys: []crypto.PublicKey{pub}}
	v := Version{Major: 3}
	good := build(v, []byte("payload"), priv)
	img, err := verifyBytes(t, good, o)
	require.NoError(t, err)
	require.Equal(t, pub, img.Key)
	require.False(t, img.Counted)

	// A dependency and a counter that nobody has signed do not count.
	img, err = verifyBytes(t, build(v, []byte("payload"), priv, TLV{Type: TLVSecCounter, Value: []byte{9, 0, 0, 0}}, TLV{Type: TLVDependency, Value: make([]byte, 12)}), o)
	require.NoError(t, err)
	require.False(t, img.Counted)
	require.Empty(t, img.Dependencies)
	img, err = verifyBytes(t, build(v, []byte("payload"), priv, TLV{Type: TLVSecCounter, Protected: true, Value: []byte{9, 0, 0, 0}}), o)
	require.NoError(t, err)
	require.Equal(t, uint32(9), img.SecurityCounter)
	for _, bad := range []TLV{{Type: TLVSecCounter, Protected: true, Value: []byte{1}}, {Type: TLVDependency, Protected: true}} {
		_, err = verifyBytes(t, build(v, nil, priv, bad), o)
		require.ErrorIs(t, err, ErrImage)
	}
	_, err = verifyBytes(t, build(v, nil, priv, TLV{Type: TLVSigPure, Value: []byte{1}}), o)
	require.ErrorIs(t, err, ota.ErrUnsupported)
	_, err = verifyBytes(t, good, &VerifyOptions{Keys: []crypto.PublicKey{other}})
	require.ErrorIs(t, err, ota.ErrUnverified)
	_, err = verifyBytes(t, good, nil)
	require.ErrorIs(t, err, ota.ErrUnverified)
	_, err = verifyBytes(t, good, &VerifyOptions{Keys: []crypto.PublicKey{"x"}})
	require.ErrorIs(t, err, ota.ErrInvalid)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	require.NoError(t, err)
	_, err = verifyBytes(t, good, &VerifyOptions{Keys: []crypto.PublicKey{&p384.PublicKey}})
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = verifyBytes(t, build(v, nil, priv, make([]TLV, 300)...), o)
	require.ErrorIs(t, err, ErrImage)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = VerifyImage(ended, bytes.NewReader(good), int64(len(good)), o)
	require.ErrorIs(t, err, context.Canceled)
}

// build returns an image, signed if there is a key.
func build(v Version, payload []byte, key ed25519.PrivateKey, tlvs ...TLV) []byte {
	area := func(magic uint16, protected bool, more ...TLV) (b []byte) {
		for _, t := range append(tlvs, more...) {
			if t.Protected == protected {
				b = binary.LittleEndian.AppendUint16(b, t.Type)
				b = append(binary.LittleEndian.AppendUint16(b, uint16(len(t.Value))), t.Value...)
			}
		}
		if protected && b == nil {
			return nil
		}
		head := binary.LittleEndian.AppendUint16(nil, magic)
		return append(binary.LittleEndian.AppendUint16(head, uint16(len(b)+4)), b...)
	}
	prot := area(tlvProtected, true)
	b := Header{HeaderSize: 64, ProtectedSize: uint16(len(prot)), ImageSize: uint32(len(payload)), Version: v}.Bytes()
	b = append(append(append(b, make([]byte, 32)...), payload...), prot...)
	sum := sha256.Sum256(b)
	more := []TLV{{Type: TLVSHA256, Value: sum[:]}}
	if key != nil {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			panic(err)
		}
		hash := sha256.Sum256(der)
		more = append(more, TLV{Type: TLVKeyHash, Value: hash[:]}, TLV{Type: TLVEd25519, Value: ed25519.Sign(key, sum[:])})
	}
	return append(b, area(tlvMagic, false, more...)...)
}

func TestHeader(t *testing.T) {
	for _, h := range []Header{{HeaderSize: 31}, {HeaderSize: 32, ImageSize: 1<<32 - 1}} {
		_, err := ParseHeader(h.Bytes())
		require.ErrorIs(t, err, ErrImage)
	}
	h := Header{1, 0x200, 3, 4, FlagROMFixed, Version{5, 6, 7, 8}}
	got, err := ParseHeader(h.Bytes())
	require.NoError(t, err)
	require.Equal(t, h, got)
	require.Equal(t, 1, Version{1, 2, 3, 4}.Compare(Version{1, 2, 3, 3}, true))
	require.Equal(t, 0, Version{1, 2, 3, 4}.Compare(Version{1, 2, 3, 3}, false))
	require.Equal(t, -1, Version{1, 2, 3, 4}.Compare(Version{1, 3, 0, 0}, true))
}

// TestGoldenTrailer: trailers made by imgtool are read, and written equally.
func TestGoldenTrailer(t *testing.T) {
	ctx := t.Context()
	for _, tc := range []struct {
		name      string
		align     int
		confirmed Flag
	}{
		{"ed25519-pad-align4.bin", 4, Unset}, {"ed25519-confirm-align8.bin", 8, Set},
		{"ed25519-confirm-align16.bin", 16, Set}, {"ed25519-confirm-align32.bin", 32, Set},
	} {
		raw := read(t, tc.name)
		for _, write := range []bool{false, true} {
			f := memflash.New(memflash.Config{Size: int64(len(raw)), EraseSize: 0x1000, WriteSize: int64(min(tc.align, 16))})
			if !write {
				_, err := f.WriteAt(raw, 0)
				require.NoError(t, err)
			}
			tr, err := NewTrailer(f, tc.align)
			require.NoError(t, err)
			if write {
				require.NoError(t, tr.write(0, false, tc.confirmed == Set))
				got := make([]byte, 0x1000)
				_, err := f.ReadAt(got, f.Size()-0x1000)
				require.NoError(t, err)
				require.Equal(t, raw[len(raw)-0x1000:], got, tc.name)
			}
			s, err := tr.Read(ctx)
			require.NoError(t, err)
			require.Equal(t, TrailerState{Magic: Set, ImageOK: tc.confirmed, SwapType: SwapNone}, s, tc.name)
		}
	}
}

// swapLoader does what a loader in a swap mode does with two trailers at a reset;
// exchange is called if it exchanges the slots.
func swapLoader(ctx context.Context, trailers [2]*Trailer, exchange func() error) error {
	p, err := trailers[0].Read(ctx)
	if err != nil {
		return err
	}
	s, err := trailers[1].Read(ctx)
	if err != nil {
		return err
	}
	next := NextSwap(p, s)
	if next == SwapNone {
		return nil
	}
	if err := exchange(); err != nil {
		return err
	}
	if err := trailers[1].Erase(); err != nil {
		return err
	}
	return trailers[0].write(0, true, next != SwapTest)
}

// TestSwap: a life in a swap mode, for all alignments and both erased values.
func TestSwap(t *testing.T) {
	ctx := t.Context()
	for align := 1; align <= 32; align *= 2 {
		for _, zero := range []bool{false, true} {
			for _, erase := range []int64{0, 1024} {
				cfg := memflash.Config{Size: 8192, EraseSize: erase, WriteSize: int64(align), ErasedZero: zero}
				if erase == 0 && zero {
					continue
				}
				chip := memflash.NewChip(cfg, cfg)
				var tr [2]*Trailer
				for i, f := range chip.Flashes() {
					var err error
					tr[i], err = NewTrailer(f, align)
					require.NoError(t, err)
					if erase == 0 {
						_, err := f.WriteAt(bytes.Repeat([]byte{0xff}, 8192), 0)
						require.NoError(t, err)
					}
				}
				swaps := 0
				boot := func() { require.NoError(t, swapLoader(ctx, tr, func() error { swaps++; return nil })) }
				expect := func(n int) {
					t.Helper()
					boot()
					require.Equal(t, n, swaps)
				}
				expect(0)
				require.NoError(t, tr[0].Confirm(ctx)) // not on trial: nothing to do
				require.NoError(t, tr[1].SetPending(ctx, false, 3))
				s, err := tr[1].Read(ctx)
				require.NoError(t, err)
				require.Equal(t, TrailerState{Magic: Set, SwapType: SwapTest, ImageNum: 3}, s)
				require.NoError(t, tr[1].SetPending(ctx, false, 3))
				expect(1)
				expect(2) // not confirmed
				expect(2)
				require.NoError(t, tr[1].SetPending(ctx, false, 0))
				expect(3)
				require.NoError(t, tr[0].Confirm(ctx))
				require.NoError(t, tr[0].Confirm(ctx))
				expect(3)
				require.NoError(t, tr[1].SetPending(ctx, false, 0))
				require.NoError(t, tr[1].SetPending(ctx, true, 0))
				expect(4)
				expect(4)
				require.NoError(t, chip.Err())
			}
		}
	}
	for _, bad := range []int{0, 3, 64, -1} {
		_, err := NewTrailer(memflash.New(memflash.Config{Size: 8192}), bad)
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
	_, err := NewTrailer(memflash.New(memflash.Config{Size: 8192, EraseSize: 64, WriteSize: 64}), 32)
	require.ErrorIs(t, err, ota.ErrInvalid)
	f := memflash.New(memflash.Config{Size: 8192, EraseSize: 1024})
	tr, err := NewTrailer(f, 8)
	require.NoError(t, err)
	require.ErrorIs(t, tr.SetPending(ctx, false, 16), ota.ErrInvalid)
	require.NoError(t, tr.write(0, true, false))
	require.NoError(t, tr.revoke())
	require.ErrorIs(t, tr.Confirm(ctx), ErrTrailer)
}

// TestSwapPowerCuts: a request and a confirmation are complete or not made.
func TestSwapPowerCuts(t *testing.T) {
	for _, align := range []int{1, 8, 32} {
		cfg := memflash.Config{Size: 4096, EraseSize: 1024, WriteSize: int64(align)}
		open := func(chip *memflash.Chip) (tr [2]*Trailer, err error) {
			for i, f := range chip.Flashes() {
				if tr[i], err = NewTrailer(f, align); err != nil {
					return tr, err
				}
			}
			return tr, nil
		}
		var scenarios []crashtest.Scenario
		for name, sc := range map[string]struct {
			base     func(tr [2]*Trailer) error
			run      func(ctx context.Context, tr [2]*Trailer) error
			old, new SwapType
		}{
			"test": {nil, func(ctx context.Context, tr [2]*Trailer) error { return tr[1].SetPending(ctx, false, 0) }, SwapNone, SwapTest},
			"perm": {nil, func(ctx context.Context, tr [2]*Trailer) error { return tr[1].SetPending(ctx, true, 0) }, SwapNone, SwapPerm},
			"confirm": {func(tr [2]*Trailer) error { return tr[0].write(byte(SwapTest), true, false) },
				func(ctx context.Context, tr [2]*Trailer) error { return tr[0].Confirm(ctx) }, SwapRevert, SwapNone},
		} {
			scenarios = append(scenarios, crashtest.Scenario{
				Name: fmt.Sprintf("%s-%d", name, align),
				New: func(ctx context.Context) (*crashtest.Device, error) {
					chip := memflash.NewChip(cfg, cfg)
					tr, err := open(chip)
					if err == nil && sc.base != nil {
						err = sc.base(tr)
					}
					done := false
					return &crashtest.Device{
						Chip: chip,
						Run: func(ctx context.Context) error {
							err := sc.run(ctx, tr)
							done = err == nil
							return err
						},
						Check: func(ctx context.Context) error {
							p, err := tr[0].Read(ctx)
							if err != nil {
								return err
							}
							s, err := tr[1].Read(ctx)
							if err != nil {
								return err
							}
							got := NextSwap(p, s)
							// A confirmation that was cut off leaves a flag that
							// is bad: the loader does not go back then, either.
							if got == sc.new || !done && got == sc.old {
								return nil
							}
							return fmt.Errorf("%w: done %v, the loader does %v", crashtest.ErrViolation, done, got)
						},
					}, err
				},
			})
		}
		crashtest.Run(t, scenarios, &crashtest.Options{Faults: []crashtest.Modes{memflash.TearModes}, Replay: *replay})
	}
}

// xipLoader does what a loader in direct-XIP mode with revert does.
func xipLoader(ctx context.Context, flashes []ota.Flash, align int) (ota.SlotID, error) {
	d, err := New(&Config{Slots: [2]ota.Flash(flashes), Align: align, Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	if err != nil {
		return ota.NoSlot, err
	}
	for range 3 {
		v, err := d.read(ctx)
		if err != nil {
			return ota.NoSlot, err
		}
		i := d.first(v)
		if !v[i].image {
			break
		}
		s, f := v[i].t, flashes[i]
		if s.Magic == Set && (s.CopyDone != Set || s.ImageOK == Set) {
			if s.CopyDone != Set {
				if err := d.trailers[i].program(d.trailers[i].copyDone(), []byte{1}); err != nil {
					return ota.NoSlot, err
				}
			}
			_, err := VerifyImage(ctx, f, f.Size(), &VerifyOptions{AllowUnsigned: true})
			if err == nil {
				return ota.SlotID(i), nil
			}
			if !errors.Is(err, ErrImage) && !errors.Is(err, ota.ErrUnsupported) {
				return ota.NoSlot, err
			}
		}
		if err := f.(ota.Eraser).Erase(0, f.Size()); err != nil {
			return ota.NoSlot, err
		}
		if err := f.Sync(); err != nil {
			return ota.NoSlot, err
		}
	}
	return ota.NoSlot, errors.New("no image")
}

// install writes an image as an update does.
func install(d *Driver, id ota.SlotID, img []byte, unit int) error {
	f, err := d.Image(id)
	if err != nil {
		return err
	}
	if err := f.(ota.Eraser).Erase(0, f.Size()); err != nil {
		return err
	}
	img = append(bytes.Clone(img), bytes.Repeat([]byte{0xff}, (unit-len(img)%unit)%unit)...)
	if _, err := f.WriteAt(img, 0); err != nil {
		return err
	}
	return f.Sync()
}

func loaders() (ls []loadertest.Loader) {
	for _, k := range []struct {
		align int
		cfg   memflash.Config
	}{
		// The loader programs copy_done again if it is neither set nor erased.
		{8, memflash.Config{Size: 4096, EraseSize: 1024, WriteSize: 8, Rewrite: true}},
		{4, memflash.Config{Size: 4096, EraseSize: 512, Unsynced: true, Rewrite: true}},
		{16, memflash.Config{Size: 4096, EraseSize: 1024, WriteSize: 16, ErasedZero: true, Rewrite: true}},
		{32, memflash.Config{Size: 8192, EraseSize: 4096, WriteSize: 32, Rewrite: true}},
	} {
		open := func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (*Driver, error) {
			return New(&Config{Slots: [2]ota.Flash(fs), Align: k.align, Running: running})
		}
		old, next := build(Version{Major: 1}, make([]byte, 200), nil), build(Version{Major: 1, Revision: 1}, make([]byte, 300), nil)
		ls = append(ls, loadertest.Loader{
			Name:    fmt.Sprintf("align-%d", k.align),
			Flashes: []memflash.Config{k.cfg, k.cfg},
			Format: func(fs []ota.Flash) error {
				d, err := open(fs, func(context.Context) (ota.SlotID, error) { return 0, nil })
				if err == nil {
					err = install(d, 0, old, k.align)
				}
				if err == nil {
					err = d.trailers[0].write(0, false, true)
				}
				return err
			},
			Open: func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
				d, err := open(fs, running)
				if err != nil {
					return nil, err
				}
				// The loader erases an image that nobody wants to try.
				ctx := context.Background()
				if id, _ := running(ctx); id == 0 {
					_, err := VerifyImage(ctx, fs[1], fs[1].Size(), &VerifyOptions{AllowUnsigned: true})
					if errors.Is(err, ErrImage) || errors.Is(err, ota.ErrUnsupported) {
						err = install(d, 1, next, k.align)
					}
					if err != nil {
						return nil, err
					}
				}
				return d, nil
			},
			Boot: func(ctx context.Context, fs []ota.Flash) (ota.SlotID, error) { return xipLoader(ctx, fs, k.align) },
			Intact: func(fs []ota.Flash) error {
				got := make([]byte, len(old))
				_, err := fs[0].ReadAt(got, 0)
				if err == nil && !bytes.Equal(got, old) {
					err = errors.New("the old image has changed")
				}
				return err
			},
			Erases: true,
			Weak:   true, // a flag has one copy
		})
	}
	return ls
}

func TestConformance(t *testing.T) {
	for _, l := range loaders() {
		t.Run(l.Name, l.Conformance)
	}
}

func TestPowerCuts(t *testing.T) {
	for _, l := range loaders() {
		l.Replay, l.Twice = *replay, *long
		l.PowerCuts(t)
	}
}

func TestDriver(t *testing.T) {
	ctx := t.Context()
	cfg := memflash.Config{Size: 8192, EraseSize: 1024, WriteSize: 8}
	chip := memflash.NewChip(cfg, cfg)
	fs := chip.Flashes()
	running := ota.SlotID(0)
	d, err := New(&Config{Slots: [2]ota.Flash(fs), Running: func(context.Context) (ota.SlotID, error) { return running, nil }})
	require.NoError(t, err)
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	committed := func(x ota.SlotID) driver.Choice { return driver.Choice{Active: x, Revert: ota.NoSlot} }
	trial := func(x ota.SlotID) driver.Choice {
		return driver.Choice{Active: x, Trial: true, Revert: 1 - x, Tries: 1}
	}
	require.ErrorIs(t, d.Write(ctx, committed(0)), ota.ErrUnverifiedSlot)
	require.NoError(t, install(d, 0, build(Version{Major: 1}, nil, nil), 8))
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrBadBootState)
	require.NoError(t, d.Write(ctx, committed(0)))

	check := func(want driver.Choice) {
		t.Helper()
		c, err := d.Read(ctx)
		require.NoError(t, err)
		require.Equal(t, want, c)
	}
	boot := func(want ota.SlotID) {
		t.Helper()
		running, err = xipLoader(ctx, fs, 8)
		require.NoError(t, err)
		require.Equal(t, want, running)
	}
	boot(0)
	check(committed(0))
	require.NoError(t, install(d, 1, build(Version{Major: 1}, nil, nil), 8))
	require.ErrorIs(t, d.Write(ctx, trial(1)), ota.ErrUnsupported) // the same version
	require.NoError(t, install(d, 1, build(Version{Major: 2}, nil, nil), 8))
	check(committed(0))
	require.NoError(t, d.Write(ctx, trial(1)))
	check(trial(1))
	require.NoError(t, d.Write(ctx, committed(0))) // thought better of it
	check(committed(0))
	require.NoError(t, d.Write(ctx, trial(1)))
	boot(1)
	check(driver.Choice{Active: 1, Trial: true, Revert: 0, Booted: true})
	require.NoError(t, d.Write(ctx, committed(1)))
	check(committed(1))
	boot(1)
	// The old image stays a reserve until its slot is written.
	require.NoError(t, install(d, 0, build(Version{Minor: 1, Major: 2}, nil, nil), 8))
	s, err := d.trailers[0].Read(ctx)
	require.NoError(t, err)
	require.Equal(t, TrailerState{SwapType: SwapNone}, s)
	check(committed(1))
	require.NoError(t, d.Write(ctx, trial(0)))
	boot(0)
	require.NoError(t, d.Write(ctx, committed(1))) // reverted by itself
	check(committed(1))
	boot(1)
	check(committed(1))
	require.ErrorIs(t, d.Write(ctx, trial(0)), ota.ErrUnverifiedSlot)
	require.ErrorIs(t, d.Write(ctx, committed(2)), ota.ErrUnknownSlot)
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 2}), ota.ErrInvalid)
	_, err = d.Image(2)
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
	require.NoError(t, chip.Err())
	for _, c := range []*Config{nil, {}, {Slots: [2]ota.Flash(fs)}, {Slots: [2]ota.Flash(fs), Align: 5, Running: d.c.Running}} {
		_, err := New(c)
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
}

func FuzzImage(f *testing.F) {
	f.Add(read(f, "plain.bin"))
	f.Add(read(f, "ed25519-dep.bin"))
	f.Add(build(Version{Major: 1}, []byte("x"), nil, TLV{Type: TLVDependency, Protected: true, Value: make([]byte, 12)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := verifyBytes(t, b, &VerifyOptions{AllowUnsigned: true})
		if err != nil {
			require.True(t, errors.Is(err, ErrImage) || errors.Is(err, ota.ErrUnsupported), "%v", err)
			return
		}
		require.LessOrEqual(t, img.Size, int64(len(b)))
	})
}

func FuzzTrailer(f *testing.F) {
	f.Add(read(f, "ed25519-confirm-align8.bin")[32768-64:], 8)
	f.Add(bytes.Repeat([]byte{0xff}, 64), 32)
	f.Fuzz(func(t *testing.T, b []byte, align int) {
		chip := memflash.NewChip(memflash.Config{Size: 4096, EraseSize: 4096, Rewrite: true})
		b = b[:min(len(b), 4096)]
		require.NoError(t, chip.Poke(0, b, int64(4096-len(b))))
		tr, err := NewTrailer(chip.Flashes()[0], align)
		if err != nil {
			require.ErrorIs(t, err, ota.ErrInvalid)
			return
		}
		_, err = tr.Read(t.Context())
		require.NoError(t, err)
		require.NoError(t, tr.SetPending(t.Context(), true, 0))
		s, err := tr.Read(t.Context())
		require.NoError(t, err)
		require.Equal(t, SwapPerm, NextSwap(TrailerState{}, s))
	})
}

func ExampleVerifyImage() {
	raw, err := os.ReadFile("testdata/ed25519-dep.bin")
	if err != nil {
		fmt.Println(err)
		return
	}
	der, err := os.ReadFile("testdata/ed.pub")
	if err != nil {
		fmt.Println(err)
		return
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		fmt.Println(err)
		return
	}
	img, err := VerifyImage(context.Background(), bytes.NewReader(raw), int64(len(raw)), &VerifyOptions{Keys: []crypto.PublicKey{key}})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(img.Header.Version, img.SecurityCounter, img.Dependencies[0].Min)
	// Output: 1.2.3+4 7 2.0.0+0
}
