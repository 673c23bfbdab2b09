package fsys

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/slotota/ota"
)

// Sim is a small file system on simulated flash. Each operation is a few writes
// there, so that faults can strike between: a file that is being written is seen
// torn, and a name that was not synced may be undone when the power comes back.
type Sim struct {
	flash [2]ota.Flash
	disk  disk
}

// SimSize is how many bytes each of the two flashes of a Sim needs.
const SimSize = 32 << 10

// disk is the content of a Sim.
type disk struct {
	Seq     uint64
	Files   map[string][]byte // as programs see them
	Durable map[string][]byte // as a power cut may leave them
}

// NewSim mounts the file system on two flashes that need no erasing; blank ones
// hold no files. reset says that this is the first time since a reset.
func NewSim(flash []ota.Flash, reset bool) (*Sim, error) {
	s := &Sim{flash: [2]ota.Flash(flash), disk: disk{Files: map[string][]byte{}, Durable: map[string][]byte{}}}
	for _, f := range s.flash {
		d, err := readDisk(f)
		if err != nil {
			return nil, err
		}
		if d.Seq > s.disk.Seq {
			s.disk = d
		}
	}
	if !reset || maps.EqualFunc(s.disk.Files, s.disk.Durable, slices.Equal) {
		return s, nil
	}
	// Either may be what the medium holds.
	if s.disk.Seq%2 == 0 {
		s.disk.Files = maps.Clone(s.disk.Durable)
	}
	return s, s.sync()
}

// readDisk reads a length, a checksum and the content.
func readDisk(f ota.Flash) (d disk, err error) {
	b := make([]byte, SimSize)
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return d, err
	}
	n := binary.LittleEndian.Uint32(b)
	if n > SimSize-8 || crc32.ChecksumIEEE(b[8:8+n]) != binary.LittleEndian.Uint32(b[4:]) {
		return d, nil
	}
	if err := json.Unmarshal(b[8:8+n], &d); err != nil && n > 0 {
		return d, err
	}
	return d, nil
}

func (s *Sim) commit() error {
	s.disk.Seq++
	j, err := json.Marshal(s.disk)
	if err != nil {
		return err
	}
	if len(j) > SimSize-8 {
		return fs.ErrInvalid
	}
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(j)))
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(j))
	f := s.flash[s.disk.Seq%2]
	if _, err := f.WriteAt(append(b, j...), 0); err != nil {
		return err
	}
	return f.Sync()
}

// sync makes all names durable.
func (s *Sim) sync() error {
	s.disk.Durable = maps.Clone(s.disk.Files)
	return s.commit()
}

func missing(op, name string) error {
	return &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
}

// ReadFile implements [FS]. It reads flash, so that read errors can strike.
func (s *Sim) ReadFile(name string) ([]byte, error) {
	var one [1]byte
	if _, err := s.flash[0].ReadAt(one[:], 0); err != nil {
		return nil, err
	}
	b, ok := s.disk.Files[name]
	if !ok {
		return nil, missing("open", name)
	}
	return slices.Clone(b), nil
}

// Open implements [FS].
func (s *Sim) Open(name string) (File, error) {
	b, err := s.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return content{bytes.NewReader(b)}, nil
}

// content is an open file.
type content struct{ *bytes.Reader }

func (content) Close() error { return nil }

// ReadDir implements [FS]. A directory exists if there is a file in it.
func (s *Sim) ReadDir(name string) ([]string, error) {
	var names []string
	for f := range s.disk.Files {
		if path.Dir(f) == path.Clean(name) {
			names = append(names, path.Base(f))
		}
	}
	if names == nil {
		return nil, missing("open", name)
	}
	slices.Sort(names)
	return names, nil
}

// WriteFile implements [FS].
func (s *Sim) WriteFile(name string, b []byte) error {
	return s.steps(name, []byte{}, b[:len(b)/2], b)
}

// steps gives a file one content after the other.
func (s *Sim) steps(name string, contents ...[]byte) error {
	for _, c := range contents {
		s.disk.Files[name] = slices.Clone(c)
		s.disk.Durable[name] = s.disk.Files[name]
		if err := s.commit(); err != nil {
			return err
		}
	}
	return nil
}

// Overwrite implements [FS].
func (s *Sim) Overwrite(name string, b []byte) error {
	old, ok := s.disk.Files[name]
	if !ok {
		return missing("open", name)
	}
	if len(old) != len(b) {
		return &fs.PathError{Op: "overwrite", Path: name, Err: fs.ErrInvalid}
	}
	var contents [][]byte
	for n := Sector; n < len(b); n += Sector {
		contents = append(contents, slices.Concat(b[:n], old[n:]))
	}
	// Until it is synced, all of it may be in memory only.
	if _, ok := s.disk.Durable[name]; ok {
		s.disk.Files[name] = slices.Clone(b)
		if err := s.commit(); err != nil {
			return err
		}
	}
	return s.steps(name, append(contents, b)...)
}

// Rename implements [FS].
func (s *Sim) Rename(from, to string) error {
	b, ok := s.disk.Files[from]
	if !ok {
		return missing("rename", from)
	}
	delete(s.disk.Files, from)
	s.disk.Files[to] = b
	return s.commit()
}

// Remove implements [FS].
func (s *Sim) Remove(name string) error {
	if _, ok := s.disk.Files[name]; !ok {
		return missing("remove", name)
	}
	delete(s.disk.Files, name)
	return s.commit()
}

// SyncDir implements [FS].
func (s *Sim) SyncDir(string) error { return s.sync() }

// String lists the files.
func (s *Sim) String() string {
	var b strings.Builder
	for _, n := range slices.Sorted(maps.Keys(s.disk.Files)) {
		fmt.Fprintf(&b, "%s (%d)\n", n, len(s.disk.Files[n]))
	}
	return b.String()
}
