// Intel AMX in software, for CPUs without it: with this library in LD_PRELOAD, the instructions of AMX, which such a CPU refuses
// (SIGILL), are executed by the handler of that signal, as the manual defines them. So tests run the machine code that CPUs with
// AMX run. Each costs microseconds. Knows the instructions and the forms of operands that csrc/cpu/amx_product.h can give.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} Shape;

static __thread Shape shape;
static __thread uint8_t tiles[8][16][64];

int simplclip_amx_in_software(void) { return 1; }

static void refuse(const uint8_t* code, const char* why) {
  fprintf(stderr, "amx.c: %s:", why);
  for (int i = 0; i < 12; ++i) fprintf(stderr, " %02x", code[i]);
  fprintf(stderr, "\n");
  abort();
}

// Numbers of the general registers in instructions, as the kernel saves them.
static const int kSaved[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static float bfloat16(const uint8_t* at) {
  uint16_t half;
  memcpy(&half, at, 2);
  uint32_t bits = (half & 0x7f80) ? (uint32_t)half << 16 : (uint32_t)(half & 0x8000) << 16;  // subnormals are zero
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// sum += left right: both sums of the even and of the odd elements, then both together.
static void multiply_add(int sum, int left, int right) {
  for (int m = 0; m < shape.rows[sum]; ++m)
    for (int n = 0; n < shape.row_bytes[sum] / 4; ++n) {
      float even = 0, odd = 0, total;
      for (int k = 0; k < shape.row_bytes[left] / 4; ++k) {
        even += bfloat16(&tiles[left][m][4 * k]) * bfloat16(&tiles[right][k][4 * n]);
        odd += bfloat16(&tiles[left][m][4 * k + 2]) * bfloat16(&tiles[right][k][4 * n + 2]);
      }
      memcpy(&total, &tiles[sum][m][4 * n], 4);
      total += even + odd;
      memcpy(&tiles[sum][m][4 * n], &total, 4);
    }
}

static void execute(int number, siginfo_t* info, void* context) {
  (void)number, (void)info;
  greg_t* const registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* const code = (const uint8_t*)registers[REG_RIP];
  // VEX prefix of three bytes, opcode map 0F38, W = 0, L = 0; what extends numbers of registers is inverted.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84)) refuse(code, "an instruction that is not known");
  const int high_reg = !(code[1] & 0x80) * 8, high_index = !(code[1] & 0x40) * 8, high_base = !(code[1] & 0x20) * 8;
  const int third = ~(code[2] >> 3) & 15, prefix = code[2] & 3;  // prefix: none, 66, F3, F2
  const int opcode = code[3], mod = code[4] >> 6, reg = ((code[4] >> 3) & 7) + high_reg, rm = code[4] & 7;
  const uint8_t* next = code + 5;
  uint8_t* at = NULL;
  long stride = 0;
  if (mod != 3) {
    int base = rm + high_base;
    if (rm == 4) {
      const int index = ((*next >> 3) & 7) + high_index;
      base = (*next & 7) + high_base;
      if (index != 4) stride = registers[kSaved[index]] << (*next >> 6);
      ++next;
    }
    if (mod == 2 || (mod == 0 && (base & 7) == 5)) refuse(code, "a form of address that is not known");
    at = (uint8_t*)registers[kSaved[base]];
    if (mod == 1) at += (int8_t)*next++;
  }
  if (opcode != 0x49 && shape.palette != 1) refuse(code, "tiles that are not configured");
  if (opcode == 0x49 && mod != 3 && reg == 0) {  // ldtilecfg, sttilecfg
    if (prefix == 0) {
      memcpy(&shape, at, sizeof shape);
      memset(tiles, 0, sizeof tiles);
      if (shape.palette > 1 || shape.start_row) refuse(code, "a configuration that is not valid");
      for (int t = 0; t < 16; ++t)
        if (shape.row_bytes[t] > (t < 8) * 64 || shape.rows[t] > (t < 8) * 16) refuse(code, "a configuration that is not valid");
    } else if (prefix == 1) {
      memcpy(at, &shape, sizeof shape);
    } else {
      refuse(code, "an instruction that is not known");
    }
  } else if (opcode == 0x49 && mod == 3 && prefix == 3 && rm == 0) {  // tilezero
    if (shape.palette != 1) refuse(code, "tiles that are not configured");
    memset(tiles[reg], 0, sizeof tiles[reg]);
  } else if (opcode == 0x4b && rm == 4 && mod != 3 && prefix >= 2) {  // tileloadd: F2, tilestored: F3
    if (prefix == 3) memset(tiles[reg], 0, sizeof tiles[reg]);
    for (int row = 0; row < shape.rows[reg]; ++row, at += stride)
      if (prefix == 3) memcpy(tiles[reg][row], at, shape.row_bytes[reg]);
      else memcpy(at, tiles[reg][row], shape.row_bytes[reg]);
  } else if (opcode == 0x5c && mod == 3 && prefix == 2) {  // tdpbf16ps
    if (reg == rm || reg == third || rm == third) refuse(code, "equal tiles");
    multiply_add(reg, rm, third);
  } else {
    refuse(code, "an instruction that is not known");
  }
  registers[REG_RIP] = (greg_t)next;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};
  action.sa_sigaction = execute;
  sigaction(SIGILL, &action, NULL);
}
