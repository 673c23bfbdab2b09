package uboot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/mtdflash"
)

// Errors of this package, wrapped with what and where.
var (
	// ErrNoEnvironment says that no copy of the environment has a valid
	// checksum. U-Boot uses its compiled-in default then. Nothing is written,
	// because every variable of the board would be lost.
	ErrNoEnvironment = errors.New("no valid copy of the environment")
	// ErrFull says that the variables do not fit into the environment.
	ErrFull = errors.New("the environment is full")
	// ErrSingle says that the environment has one copy, on a medium where it
	// cannot be replaced atomically.
	ErrSingle = errors.New("the environment is not redundant: a power cut while it is written would lose it")
)

// Flags is how the newer of two copies is told from the older one. U-Boot and its
// tools choose the scheme by the kind of storage.
type Flags uint8

// The schemes.
const (
	// Incremental is for block devices, files, NAND and UBI: a counter.
	Incremental Flags = iota
	// Boolean is for NOR flash: 1 in the active copy, 0 in the obsolete one.
	Boolean
)

// EnvOptions say how an environment is stored. The zero value is that of a
// little-endian processor with the environment on a block device.
type EnvOptions struct {
	// Size is the number of bytes of a copy, header included (CONFIG_ENV_SIZE).
	// 0 means the size of the Flash.
	Size int64
	// Flags is the scheme of a redundant environment.
	Flags Flags
	// BigEndian says that the processor is; the checksum is in its byte order.
	BigEndian bool
	// AllowSingle allows to write an environment of which there is only one
	// copy, on a medium where that is not atomic: a power cut loses it whole.
	AllowSingle bool
}

// Bounds of an environment.
const (
	minSize = 16
	maxSize = 1 << 20
)

// Var is a variable of the environment. One without Name is an entry that is no
// variable, Value being all of it; it is kept as it is.
type Var struct{ Name, Value string }

// Vars are the variables of an environment, in its order.
type Vars []Var

// Get returns the value of the named variable, and whether there is one.
func (v Vars) Get(name string) (value string, ok bool) {
	for i := range v {
		if v[i].Name == name { // the last one counts, as in U-Boot
			value, ok = v[i].Value, true
		}
	}
	return value, ok
}

// with returns v with changes applied: a variable keeps its place, a new one comes
// last, one without a value goes.
func (v Vars) with(changes []Change) Vars {
	v = slices.Clone(v)
	for _, c := range changes {
		i := slices.IndexFunc(v, func(x Var) bool { return x.Name == c.Name })
		v = slices.DeleteFunc(v, func(x Var) bool { return x.Name == c.Name })
		switch {
		case c.Unset:
		case i < 0:
			v = append(v, Var{c.Name, c.Value})
		default:
			v = slices.Insert(v, i, Var{c.Name, c.Value})
		}
	}
	return v
}

// Change sets a variable, or removes it.
type Change struct {
	Name, Value string
	Unset       bool
}

// Set returns the change that gives the named variable a value.
func Set(name, value string) Change { return Change{Name: name, Value: value} }

// Env is a U-Boot environment in one or two copies. It is safe for concurrent use
// by one process; [Open] adds locks against others.
//
// A copy is a checksum (CRC-32 of the data, in the byte order of the processor), a
// byte of flags if there are two copies, and the data: "name=value", each ended by
// a zero byte, and one more zero byte (u-boot, include/env_internal.h).
type Env struct {
	copies []ota.Flash
	o      EnvOptions
	header int64
	lock   func(ctx context.Context) (unlock func(), err error)
	sem    chan struct{}
}

// NewEnv returns the environment whose copies start at the start of the given
// storage: one, or two if it is redundant. On media with erase units what follows
// a copy in its last unit is kept, at the risk of a power cut.
func NewEnv(copies []ota.Flash, o *EnvOptions) (*Env, error) {
	e := &Env{copies: slices.Clone(copies), header: 4, sem: make(chan struct{}, 1)}
	if o != nil {
		e.o = *o
	}
	if len(copies) < 1 || len(copies) > 2 || len(copies) == 2 && reflect.TypeOf(copies[0]).Comparable() && copies[0] == copies[1] {
		return nil, fmt.Errorf("uboot: %d copies of the environment, need one or two different ones: %w", len(copies), ota.ErrInvalid)
	}
	if len(copies) == 2 {
		e.header++
	}
	for i, f := range copies {
		if e.o.Size == 0 {
			e.o.Size = f.Size()
		}
		if e.o.Size < minSize || e.o.Size > maxSize || e.o.Size > f.Size() {
			return nil, fmt.Errorf("uboot: copy %d: environment of %d bytes in %d, need %d to %d: %w", i, e.o.Size, f.Size(), minSize, maxSize, ota.ErrInvalid)
		}
	}
	return e, nil
}

// Redundant reports whether there are two copies.
func (e *Env) Redundant() bool { return len(e.copies) == 2 }

// order is the byte order of the checksum.
func (e *Env) order() binary.ByteOrder {
	if e.o.BigEndian {
		return binary.BigEndian
	}
	return binary.LittleEndian
}

// content is one copy, as read.
type content struct {
	raw []byte
	err error // why it does not count
	io  bool  // because it could not be read
}

func (e *Env) readCopy(i int) content {
	c := content{raw: make([]byte, e.o.Size)}
	n, err := e.copies[i].ReadAt(c.raw, 0)
	switch {
	case n == len(c.raw):
		if crc := e.order().Uint32(c.raw); crc != crc32.ChecksumIEEE(c.raw[e.header:]) {
			c.err = fmt.Errorf("copy %d: bad checksum", i)
		}
	case err == nil || err == io.EOF:
		c.err, c.io = fmt.Errorf("copy %d: %w", i, io.ErrUnexpectedEOF), true
	case errors.Is(err, mtdflash.ErrECC):
		// What a power cut leaves on NAND. U-Boot passes over it, too, and it
		// reads no better before it is written anew.
		c.err = fmt.Errorf("copy %d: %w", i, err)
	default:
		c.err, c.io = fmt.Errorf("copy %d: %w", i, err), true
	}
	return c
}

// scan reads all copies and returns the index of the one that counts.
func (e *Env) scan() (cs []content, cur int, err error) {
	var bad []error
	failed := false
	for i := range e.copies {
		c := e.readCopy(i)
		cs = append(cs, c)
		if c.err != nil {
			bad = append(bad, c.err)
			failed = failed || c.io
		}
	}
	switch {
	case len(bad) == len(cs) && failed:
		return cs, 0, fmt.Errorf("uboot: %w", errors.Join(bad...))
	case len(bad) == len(cs):
		return cs, 0, fmt.Errorf("uboot: %w: %w", ErrNoEnvironment, errors.Join(bad...))
	case failed:
		// The copy that cannot be read may be the newer one.
		return cs, 0, fmt.Errorf("uboot: %w", errors.Join(bad...))
	case len(cs) == 1 || cs[1].err != nil:
		return cs, 0, nil
	case cs[0].err != nil:
		return cs, 1, nil
	}
	return cs, newer(e.o.Flags, cs[0].raw[4], cs[1].raw[4]), nil
}

// newer returns which of two sound copies with these flags U-Boot takes
// (u-boot, env/common.c, env_check_redund; tools/env/fw_env.c).
func newer(scheme Flags, a, b byte) int {
	if scheme == Incremental {
		// Not a modular comparison, but for this one pair.
		if a == 0xff && b == 0 {
			return 1
		}
		if b > a && !(b == 0xff && a == 0) {
			return 1
		}
		return 0
	}
	switch {
	case a == 1 && b == 0:
		return 0
	case a == 0 && b == 1:
		return 1
	case a == b, a == 0xff:
		return 0
	case b == 0xff:
		return 1
	}
	return 0
}

// Read returns the variables. The error wraps [ErrNoEnvironment] if every copy was
// read and none is valid.
func (e *Env) Read(ctx context.Context) (Vars, error) {
	unlock, err := e.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	cs, cur, err := e.scan()
	if err != nil {
		return nil, err
	}
	return parse(cs[cur].raw[e.header:]), nil
}

// Write applies changes to the environment in one step: with two copies a power
// cut leaves the old or the new variables. All other variables stay. What was
// written is read back. Write needs a valid environment to begin with; it does
// nothing if no variable changes.
func (e *Env) Write(ctx context.Context, changes ...Change) error {
	for _, c := range changes {
		if c.Name == "" || strings.ContainsAny(c.Name, "=\x00") || strings.Contains(c.Value, "\x00") {
			return fmt.Errorf("uboot: variable %s: no name, or a character that cannot be stored: %w", ota.Quote(c.Name), ota.ErrInvalid)
		}
	}
	unlock, err := e.enter(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	cs, cur, err := e.scan()
	if err != nil {
		return err
	}
	old := parse(cs[cur].raw[e.header:])
	vars := old.with(changes)
	if slices.Equal(old, vars) {
		return nil
	}
	raw := make([]byte, e.o.Size)
	if err := format(raw[e.header:], vars); err != nil {
		return err
	}
	e.order().PutUint32(raw, crc32.ChecksumIEEE(raw[e.header:]))
	if !e.Redundant() {
		return e.writeSingle(raw)
	}
	next := 1 - cur
	raw[4] = 1
	if e.o.Flags == Incremental {
		raw[4] = cs[cur].raw[4] + 1
	}
	if err := e.replace(next, raw); err != nil {
		return fmt.Errorf("uboot: copy %d: %w", next, err)
	}
	if e.o.Flags == Boolean {
		if err := e.obsolete(cur); err != nil {
			return fmt.Errorf("uboot: copy %d: %w", cur, err)
		}
	}
	switch cs, got, err := e.scan(); {
	case err != nil:
		return err
	case got != next || !bytes.Equal(cs[got].raw, raw):
		return fmt.Errorf("uboot: the environment reads differently from what was written: %w", ota.ErrVerify)
	}
	return nil
}

// writeSingle replaces the only copy.
func (e *Env) writeSingle(raw []byte) error {
	if r, ok := e.copies[0].(replacer); ok {
		if err := r.replaceAll(raw); err != nil {
			return fmt.Errorf("uboot: %w", err)
		}
	} else {
		if !e.o.AllowSingle {
			return fmt.Errorf("uboot: %w", ErrSingle)
		}
		if err := e.replace(0, raw); err != nil {
			return fmt.Errorf("uboot: %w", err)
		}
	}
	if c := e.readCopy(0); c.err != nil || !bytes.Equal(c.raw, raw) {
		return fmt.Errorf("uboot: the environment reads differently from what was written: %w", errors.Join(ota.ErrVerify, c.err))
	}
	return nil
}

// replacer is storage that can be replaced as a whole, atomically.
type replacer interface{ replaceAll(b []byte) error }

// replace writes raw over copy i and syncs.
func (e *Env) replace(i int, raw []byte) error {
	f := e.copies[i]
	// Whole erase and write units, with what stands behind the environment.
	end := int64(len(raw))
	er, erase := f.(ota.Eraser)
	if erase {
		start, n := ota.EraseUnit(f, end-1)
		end = start + n
	} else if w := ota.WriteSize(f); end%w != 0 {
		end += w - end%w
	}
	if end > f.Size() || end < int64(len(raw)) {
		return fmt.Errorf("the environment ends inside the last unit: %w", ota.ErrInvalid)
	}
	if end > int64(len(raw)) {
		raw = append(slices.Clip(raw), make([]byte, end-int64(len(raw)))...)
		if err := keep(f, raw[e.o.Size:], e.o.Size); err != nil {
			return fmt.Errorf("reading what follows: %w", err)
		}
	}
	if erase {
		if err := er.Erase(0, end); err != nil {
			return err
		}
	}
	if n, err := f.WriteAt(raw, 0); err != nil {
		return err
	} else if n != len(raw) {
		return io.ErrShortWrite
	}
	return f.Sync()
}

// keep reads what follows a copy, page by page where it cannot be read as a whole: one
// that a power cut has made unreadable on NAND is written as an erased one.
func keep(f ota.Flash, tail []byte, off int64) error {
	size, w := int64(len(tail)), ota.WriteSize(f)
	for len(tail) > 0 {
		b := tail[:min(size, int64(len(tail)))]
		n, err := f.ReadAt(b, off)
		next := w - off%w
		switch {
		case n == len(b):
		case !errors.Is(err, mtdflash.ErrECC):
			return errors.Join(io.ErrUnexpectedEOF, err)
		case int64(len(b)) > next:
			size = next
			continue
		default:
			for i := range b {
				b[i] = ota.ErasedByte(f)
			}
		}
		tail, off, size = tail[len(b):], off+int64(len(b)), w
	}
	return nil
}

// obsolete clears the flag of copy i, which needs no erasing.
func (e *Env) obsolete(i int) error {
	f := e.copies[i]
	w := ota.WriteSize(f)
	b := make([]byte, w)
	off := 4 / w * w
	if n, err := f.ReadAt(b, off); n != len(b) {
		return err
	}
	if b[4-off] == 0 {
		return nil
	}
	b[4-off] = 0
	if _, err := f.WriteAt(b, off); err != nil {
		return err
	}
	return f.Sync()
}

// enter waits for its turn, and for the locks of other programs.
func (e *Env) enter(ctx context.Context) (leave func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case e.sem <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	unlock := func() {}
	if e.lock != nil {
		if unlock, err = e.lock(ctx); err != nil {
			<-e.sem
			return nil, err
		}
	}
	return func() {
		unlock()
		<-e.sem
	}, nil
}

// parse splits the data of an environment. What has no name or no "=" is kept, as a
// value without name that format writes as it was.
func parse(data []byte) Vars {
	var v Vars
	for len(data) > 0 && data[0] != 0 {
		end := bytes.IndexByte(data, 0)
		if end < 0 {
			end = len(data)
		}
		name, value, ok := strings.Cut(string(data[:end]), "=")
		if !ok || name == "" {
			name, value = "", string(data[:end])
		}
		v = append(v, Var{name, value})
		data = data[min(end+1, len(data)):]
	}
	return v
}

// format writes the variables into data, the rest of which is zero, as U-Boot
// leaves it.
func format(data []byte, vars Vars) error {
	b := data[:0]
	for _, x := range vars {
		n := len(x.Name) + len(x.Value) + 2
		if len(data)-len(b) < n+1 {
			return fmt.Errorf("uboot: %d bytes for variable %s: %w", len(data), ota.Quote(x.Name), ErrFull)
		}
		if x.Name != "" {
			b = append(append(b, x.Name...), '=')
		}
		b = append(append(b, x.Value...), 0)
	}
	clear(data[len(b):])
	return nil
}
