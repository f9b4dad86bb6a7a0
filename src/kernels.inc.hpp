// The table of one instruction set; included by each isa file after the kernels, inside nothing.
namespace dcn::DCN_ISA {

#define DCN_ROW(kernel, type) {kernel<type, 1>, kernel<type, 2>, kernel<type, 3>}
#define DCN_FORWARD(name, type) DCN_ROW(forward, type),
#define DCN_PREPARE_FORWARD(name, type) DCN_ROW(prepare_forward, type),
#define DCN_BACKWARD(name, type) DCN_ROW(backward, type),
#define DCN_LOGISTIC(name, type) logistic<type>,
#define DCN_ROI_FORWARD(name, type) roi_forward<type>,
#define DCN_ROI_BACKWARD(name, type) roi_backward<type>,
#define DCN_STRING(name) #name
#define DCN_NAME(name) DCN_STRING(name)

extern const Kernels kKernels;
const Kernels kKernels = {DCN_NAME(DCN_ISA),
                          {DCN_FOR_EACH_DTYPE(DCN_FORWARD)},
                          {DCN_FOR_EACH_DTYPE(DCN_PREPARE_FORWARD)},
                          {DCN_FOR_EACH_DTYPE(DCN_BACKWARD)},
                          {DCN_FOR_EACH_DTYPE(DCN_LOGISTIC)},
                          {DCN_FOR_EACH_DTYPE(DCN_ROI_FORWARD)},
                          {DCN_FOR_EACH_DTYPE(DCN_ROI_BACKWARD)}};

}  // namespace dcn::DCN_ISA
